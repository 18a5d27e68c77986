//! Image engines side by side, without NBD: `engines NAME SOURCE IMAGE` writes SOURCE into a fresh
//! image in requests of 1 MiB, makes it durable and prints the seconds. `benches/peers` runs it.
#![allow(missing_docs, clippy::print_stdout)]

use std::error::Error;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate};
use qcow2::{CreateOptions, Image, OpenOptions, create};
use qcow2_rs::dev::Qcow2DevParams;
use qcow2_rs::helpers::Qcow2IoBuf;
use qcow2_rs::utils::qcow2_setup_dev_sync;

/// Bytes of a request.
const PIECE: usize = 1 << 20;
/// Requests in flight where the engine can have several.
const THREADS: usize = 4;

type Outcome<T> = Result<T, Box<dyn Error>>;

/// A page-aligned buffer: what direct I/O needs.
fn buffer() -> Qcow2IoBuf<u8> {
    Qcow2IoBuf::new(PIECE)
}

fn ours(source: &File, size: u64, path: &Path) -> Outcome<()> {
    let image = Image::open(path, &OpenOptions::new())?;
    std::thread::scope(|scope| {
        let write = |first: usize| {
            let image = &image;
            move || -> Result<(), Box<dyn Error + Send + Sync>> {
                let mut piece = buffer();
                for at in ((first * PIECE) as u64..size).step_by(PIECE * THREADS) {
                    source.read_exact_at(&mut piece, at)?;
                    image.write_at(&piece, at)?;
                }
                Ok(())
            }
        };
        let threads: Vec<_> = (0..THREADS).map(|n| scope.spawn(write(n))).collect();
        threads.into_iter().try_for_each(|thread| match thread.join() {
            Ok(result) => result.map_err(|e| e.to_string()),
            Err(_) => Err("a thread panicked".into()),
        })
    })?;
    Ok(image.close()?)
}

async fn imago(source: &File, size: u64, path: &Path) -> Outcome<()> {
    let image = Qcow2::<imago::file::File>::builder_path(path)
        .write(true)
        .open(PermissiveImplicitOpenGate::default())
        .await?;
    let image = FormatAccess::new(image);
    let mut piece = buffer();
    for at in (0..size).step_by(PIECE) {
        source.read_exact_at(&mut piece, at)?;
        image.write(&piece[..], at).await?;
    }
    image.flush().await?;
    Ok(image.sync().await?)
}

async fn qcow2_rs(source: &File, size: u64, path: &Path) -> Outcome<()> {
    let image = qcow2_setup_dev_sync(path, &Qcow2DevParams::new(9, None, None, false, false))
        .map_err(|e| format!("{e:?}"))?;
    image.qcow2_prep_io().await.map_err(|e| format!("{e:?}"))?;
    let mut piece = buffer();
    for at in (0..size).step_by(PIECE) {
        source.read_exact_at(&mut piece, at)?;
        image.write_at(&piece, at).await.map_err(|e| format!("{e:?}"))?;
    }
    image.flush_meta().await.map_err(|e| format!("{e:?}"))?;
    File::options().write(true).open(path)?.sync_all()?;
    Ok(())
}

fn main() -> Outcome<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let [name, source, image] = &arguments[..] else {
        println!("usage: engines ours|imago|qcow2-rs SOURCE IMAGE");
        return Ok(());
    };
    let source = File::open(source)?;
    let size = source.metadata()?.len() / PIECE as u64 * PIECE as u64;
    let path = Path::new(image);
    create(path, &CreateOptions::new(size))?;
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    let start = Instant::now();
    match name.as_str() {
        "ours" => ours(&source, size, path)?,
        "imago" => runtime.block_on(imago(&source, size, path))?,
        "qcow2-rs" => runtime.block_on(qcow2_rs(&source, size, path))?,
        other => return Err(format!("no engine is called {other}").into()),
    }
    println!("{}", start.elapsed().as_secs_f64());
    Ok(())
}
