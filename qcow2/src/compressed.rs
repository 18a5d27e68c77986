//! Reading compressed clusters (QCOW2 specification, "Compressed Clusters Descriptor").

use std::io::Read;

use flate2::{Decompress, FlushDecompress, Status};

use crate::error::{Error, Result};
use crate::header::Compression;
use crate::storage::Storage;
use crate::table::entry::CompressedRef;

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
