//! Starts processes from one thread that lives as long as the hub.
//!
//! A worker asks the kernel to be killed with whoever started it, and the kernel takes that for the
//! thread. Threads of a request come and go.

use std::io;
use std::process::{Child, Command};
use std::sync::{LazyLock, Mutex, PoisonError, mpsc};

type Job = (Command, mpsc::Sender<io::Result<Child>>);

static JOBS: LazyLock<Mutex<Option<mpsc::Sender<Job>>>> = LazyLock::new(Mutex::default);

fn start_thread() -> io::Result<mpsc::Sender<Job>> {
    let (jobs, work) = mpsc::channel::<Job>();
    std::thread::Builder::new().name("spawner".into()).spawn(move || {
        while let Ok((mut command, answer)) = work.recv() {
            let _ = answer.send(command.spawn());
        }
    })?;
    Ok(jobs)
}

/// Starts `command`; it may be waited for from any thread.
///
/// # Errors
/// Those of [`Command::spawn`].
pub(super) fn spawn(command: Command) -> io::Result<Child> {
    let jobs = {
        let mut jobs = JOBS.lock().unwrap_or_else(PoisonError::into_inner);
        match &*jobs {
            Some(jobs) => jobs.clone(),
            None => jobs.insert(start_thread()?).clone(),
        }
    };
    let (answer, answered) = mpsc::channel();
    let gone = || io::Error::other("the thread that starts processes is gone");
    jobs.send((command, answer)).map_err(|_| gone())?;
    answered.recv().map_err(|_| gone())?
}
