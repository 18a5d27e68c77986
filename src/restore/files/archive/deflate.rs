//! Raw DEFLATE into a writer, with long runs of zeroes made ahead.
//!
//! Nothing is written on drop: a stream that was not finished stays unfinished.

use std::io::{self, Write};

use flate2::{Compress, Compression, FlushCompress};

/// Bytes of one run that is made ahead.
const RUN: usize = 1 << 20;
/// Bytes of output at a time.
const OUTPUT: usize = 128 << 10;
/// An empty block with fixed codes that is the last.
const LAST: [u8; 2] = [3, 0];
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// A compressor with its checksum; one stream after another.
pub(super) struct Deflater {
    compress: Compress,
    output: Vec<u8>,
    /// [`RUN`] zeroes, compressed; begins and ends at a byte and refers to nothing before it.
    run: Vec<u8>,
    run_crc: crc32fast::Hasher,
    crc: crc32fast::Hasher,
    read: u64,
    written: u64,
}

impl Deflater {
    pub(super) fn new() -> io::Result<Self> {
        let mut deflater = Self {
            compress: Compress::new(Compression::fast(), false),
            output: vec![0; OUTPUT],
            run: Vec::new(),
            run_crc: crc32fast::Hasher::new(),
            crc: crc32fast::Hasher::new(),
            read: 0,
            written: 0,
        };
        let mut run = Vec::new();
        for _ in 0..RUN / ZEROES.len() {
            deflater.data(&ZEROES, &mut run)?;
        }
        deflater.push(&[], FlushCompress::Full, &mut run)?;
        deflater.run = run;
        deflater.run_crc = deflater.crc.clone();
        deflater.reset();
        Ok(deflater)
    }

    /// Begins another stream. The compressor goes on: what was before ended with a full flush, and nothing
    /// that follows refers to it.
    pub(super) fn reset(&mut self) {
        self.crc = crc32fast::Hasher::new();
        (self.read, self.written) = (0, 0);
    }

    pub(super) fn data(&mut self, bytes: &[u8], out: &mut dyn Write) -> io::Result<()> {
        self.crc.update(bytes);
        self.read += bytes.len() as u64;
        self.push(bytes, FlushCompress::None, out)
    }

    pub(super) fn zeroes(&mut self, mut count: u64, out: &mut dyn Write) -> io::Result<()> {
        if count >= 2 * RUN as u64 {
            // What follows the flush refers to nothing before it, so runs may stand in between.
            self.push(&[], FlushCompress::Full, out)?;
            while count >= RUN as u64 {
                out.write_all(&self.run)?;
                self.crc.combine(&self.run_crc);
                self.read += RUN as u64;
                self.written += self.run.len() as u64;
                count -= RUN as u64;
            }
        }
        while count > 0 {
            let part = usize::try_from(count).unwrap_or(usize::MAX).min(ZEROES.len());
            self.data(ZEROES.get(..part).unwrap_or(&ZEROES), out)?;
            count -= part as u64;
        }
        Ok(())
    }

    /// Ends the stream: a full flush, which ends at a byte, and an empty last block.
    pub(super) fn finish(&mut self, out: &mut dyn Write) -> io::Result<()> {
        self.push(&[], FlushCompress::Full, out)?;
        self.written += LAST.len() as u64;
        out.write_all(&LAST)
    }

    /// CRC-32 of what went in.
    pub(super) fn crc(&self) -> u32 {
        self.crc.clone().finalize()
    }

    /// Bytes that went in.
    pub(super) fn read(&self) -> u64 {
        self.read
    }

    /// Bytes that came out.
    pub(super) fn written(&self) -> u64 {
        self.written
    }

    fn push(
        &mut self,
        mut input: &[u8],
        flush: FlushCompress,
        out: &mut dyn Write,
    ) -> io::Result<()> {
        loop {
            let (read, written) = (self.compress.total_in(), self.compress.total_out());
            self.compress.compress(input, &mut self.output, flush)?;
            let consumed = usize::try_from(self.compress.total_in() - read).unwrap_or(usize::MAX);
            let produced =
                usize::try_from(self.compress.total_out() - written).unwrap_or(usize::MAX);
            input = input.get(consumed..).unwrap_or_default();
            out.write_all(self.output.get(..produced).unwrap_or(&self.output))?;
            self.written += produced as u64;
            // A flush is over when it leaves room.
            let room = flush == FlushCompress::None || produced < self.output.len();
            if input.is_empty() && room {
                return Ok(());
            }
            if consumed == 0 && produced == 0 {
                return Err(io::Error::other("the compressor stands still"));
            }
        }
    }
}

/// A gzip stream into a writer.
pub(super) struct Gzip<'w> {
    out: &'w mut dyn Write,
    deflater: Deflater,
}

impl<'w> Gzip<'w> {
    pub(super) fn new(out: &'w mut dyn Write) -> io::Result<Self> {
        // No name, no time, made on Unix.
        out.write_all(&[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 4, 3])?;
        Ok(Self { out, deflater: Deflater::new()? })
    }

    pub(super) fn data(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.deflater.data(bytes, self.out)
    }

    pub(super) fn zeroes(&mut self, count: u64) -> io::Result<()> {
        self.deflater.zeroes(count, self.out)
    }

    pub(super) fn finish(&mut self) -> io::Result<()> {
        self.deflater.finish(self.out)?;
        self.out.write_all(&self.deflater.crc().to_le_bytes())?;
        let [a, b, c, d, ..] = self.deflater.read().to_le_bytes();
        self.out.write_all(&[a, b, c, d])?;
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    #[test]
    fn runs_of_zeroes_read_as_what_they_stand_for() {
        let mut bytes = Vec::new();
        let mut gzip = Gzip::new(&mut bytes).unwrap();
        let noise: Vec<u8> =
            (0..100_000u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
        let mut wanted = Vec::new();
        for zeroes in [0, 1, 1 << 20, (5 << 20) + 77, 0, 3 << 20] {
            gzip.data(&noise).unwrap();
            gzip.zeroes(zeroes).unwrap();
            wanted.extend_from_slice(&noise);
            wanted.resize(wanted.len() + usize::try_from(zeroes).unwrap(), 0);
        }
        gzip.finish().unwrap();
        let mut read = Vec::new();
        flate2::read::GzDecoder::new(&bytes[..]).read_to_end(&mut read).unwrap();
        assert!(read == wanted);
    }
}
