//! Reading compressed clusters (QCOW2 specification, "Compressed Clusters Descriptor").

use std::io::Read;
use std::sync::{Arc, Mutex, PoisonError};

use flate2::{Decompress, FlushDecompress, Status};

use crate::error::{Error, Result};
use crate::header::Compression;
use crate::storage::Storage;
use crate::table::entry::CompressedRef;

/// Reads parts of compressed clusters; the cluster read last is kept, as small sequential reads
/// would decompress it again and again.
#[derive(Default)]
pub(crate) struct ClusterReader {
    last: Mutex<Option<(Key, Arc<[u8]>)>>,
}

/// File (by address of its storage) and host offset of the data.
type Key = (usize, u64);

impl ClusterReader {
    /// Fills `buf` from byte `inside` of the decompressed cluster.
    ///
    /// # Errors
    /// As [`read_cluster`].
    pub(crate) fn read(
        &self,
        storage: &dyn Storage,
        compression: Compression,
        data: CompressedRef,
        cluster_size: u64,
        inside: u64,
        buf: &mut [u8],
    ) -> Result<()> {
        let key = (std::ptr::from_ref(storage).cast::<()>().addr(), data.host.0);
        let known = {
            let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
            last.as_ref().filter(|(k, _)| *k == key).map(|(_, bytes)| Arc::clone(bytes))
        };
        let cluster = match known {
            Some(cluster) => cluster,
            None => {
                #[allow(clippy::cast_possible_truncation, reason = "a cluster is at most 2 MiB")]
                let mut cluster = vec![0; cluster_size as usize];
                read_cluster(storage, compression, data, &mut cluster)?;
                let cluster: Arc<[u8]> = cluster.into();
                let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
                *last = Some((key, Arc::clone(&cluster)));
                cluster
            }
        };
        #[allow(clippy::cast_possible_truncation, reason = "inside a cluster of at most 2 MiB")]
        let start = inside as usize;
        match cluster.get(start..start + buf.len()) {
            Some(bytes) => {
                buf.copy_from_slice(bytes);
                Ok(())
            }
            None => Err(Error::corrupt("a compressed segment crosses its cluster")),
        }
    }
}

/// Decompresses one cluster into `cluster`, whose length is the cluster size.
///
/// # Errors
/// `Io`; `Corrupt` where the data ends before the cluster does.
pub(crate) fn read_cluster(
    storage: &dyn Storage,
    compression: Compression,
    data: CompressedRef,
    cluster: &mut [u8],
) -> Result<()> {
    // The descriptor's sector count is bounded by its bits: at most twice a cluster.
    let length = usize::try_from(data.length).unwrap_or(usize::MAX).min(2 * cluster.len() + 512);
    let mut packed = vec![0; length];
    storage
        .read_at(&mut packed, data.host.0)
        .map_err(|e| Error::io(format!("cannot read compressed data at {}", data.host), e))?;
    let whole = match compression {
        Compression::Deflate => inflate(&packed, cluster),
        Compression::Zstd => unzstd(&packed, cluster),
    };
    if whole {
        return Ok(());
    }
    Err(Error::corrupt(format!(
        "compressed data at host offset {} does not decompress to a cluster; restore this range \
         from another backup",
        data.host
    )))
}

fn inflate(packed: &[u8], cluster: &mut [u8]) -> bool {
    let mut stream = Decompress::new(false);
    let result = stream.decompress(packed, cluster, FlushDecompress::Finish);
    // The input is padded to sectors, so the stream may end early in it or fill the output first.
    matches!(result, Ok(Status::StreamEnd | Status::Ok | Status::BufError))
        && stream.total_out() == cluster.len() as u64
}

fn unzstd(packed: &[u8], cluster: &mut [u8]) -> bool {
    ruzstd::decoding::StreamingDecoder::new(packed)
        .is_ok_and(|mut decoder| decoder.read_exact(cluster).is_ok())
}
