//! The disk of the demonstration: a FAT file system with files that later change.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use fatfs::{FileSystem, FormatVolumeOptions, FsOptions, format_volume};

/// Bytes of the disk.
const SIZE: u64 = 1 << 30;
/// Files at first, and bytes of each.
const FILES: (u64, usize) = (24, 12 << 20);
/// Bytes written at once.
const CHUNK: usize = 64 << 10;

/// A raw disk image with a file system on it.
pub(super) struct Disk {
    path: PathBuf,
}

/// Numbers that look random but are the same in every run.
struct Noise(u64);

impl Noise {
    fn fill(&mut self, bytes: &mut [u8]) {
        for part in bytes.chunks_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            part.copy_from_slice(&self.0.to_le_bytes()[..part.len()]);
        }
    }
}

impl Disk {
    /// Makes the disk, formats it and fills it with files.
    pub(super) fn create(path: &Path) -> io::Result<Self> {
        let mut file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
        file.set_len(SIZE)?;
        format_volume(&mut file, FormatVolumeOptions::new().volume_label(*b"SENDENSE   "))?;
        let disk = Self { path: path.to_owned() };
        disk.with_files(|root| {
            for number in 0..FILES.0 {
                let mut file = root.create_file(&format!("file-{number:02}.bin"))?;
                write_noise(&mut file, number + 1, FILES.1)?;
            }
            let mut notes = root.create_file("notes.txt")?;
            notes.write_all(b"Full backup first.\n")
        })?;
        Ok(disk)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    #[allow(clippy::unused_self, reason = "the disk's, whatever its size")]
    pub(super) fn size(&self) -> u64 {
        SIZE
    }

    /// A copy of the disk as it is now, to find out later what changed.
    pub(super) fn keep_copy(&self, to: &Path) -> io::Result<PathBuf> {
        std::fs::copy(&self.path, to)?;
        Ok(to.to_owned())
    }

    /// What a day does to a disk: files are rewritten in part, removed, and added.
    pub(super) fn change(&mut self) -> io::Result<()> {
        self.with_files(|root| {
            let mut file = root.open_file("file-03.bin")?;
            file.seek(SeekFrom::Start(5 << 20))?;
            write_noise(&mut file, 1000, 1 << 20)?;
            drop(file);
            root.remove("file-07.bin")?;
            let mut file = root.create_file("new.bin")?;
            write_noise(&mut file, 2000, 6 << 20)?;
            drop(file);
            let mut notes = root.open_file("notes.txt")?;
            notes.seek(SeekFrom::End(0))?;
            notes.write_all(b"Then the incremental.\n")
        })
    }

    /// What `read` makes of a file on the disk.
    pub(super) fn read_file<T>(
        &self,
        name: &str,
        read: impl FnOnce(&mut dyn Read) -> io::Result<T>,
    ) -> io::Result<T> {
        self.with_files(|root| read(&mut root.open_file(name)?))
    }

    fn with_files<T>(
        &self,
        work: impl FnOnce(&fatfs::Dir<'_, File>) -> io::Result<T>,
    ) -> io::Result<T> {
        let file = OpenOptions::new().read(true).write(true).open(&self.path)?;
        let system = FileSystem::new(file, FsOptions::new())?;
        let result = work(&system.root_dir())?;
        system.unmount()?;
        Ok(result)
    }
}

fn write_noise(file: &mut impl Write, seed: u64, length: usize) -> io::Result<()> {
    let mut noise = Noise(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut chunk = vec![0; CHUNK];
    for _ in 0..length / CHUNK {
        noise.fill(&mut chunk);
        file.write_all(&chunk)?;
    }
    Ok(())
}

/// Reads one block of a disk; short at its end.
pub(super) fn read_block(file: &mut File, buf: &mut [u8]) -> io::Result<usize> {
    let mut length = 0;
    while length < buf.len() {
        match file.read(&mut buf[length..])? {
            0 => break,
            n => length += n,
        }
    }
    Ok(length)
}
