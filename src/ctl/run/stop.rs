//! Ctrl-C and SIGTERM: the first one asks to stop, the second one ends the process.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use tokio::signal::unix::{SignalKind, signal};

use crate::ctl::error::{CtlError, CtlResult, INTERRUPTED, Kind};

/// How often a wait looks whether to stop.
const TICK: Duration = Duration::from_millis(50);

/// Whether somebody wants this process to stop.
#[derive(Clone)]
pub(super) struct Stop(Arc<AtomicBool>);

impl Stop {
    /// From now on signals do not end the process by themselves.
    pub(super) fn install() -> CtlResult<Self> {
        let stop = Self(Arc::default());
        let wanted = stop.clone();
        let (tell, told) = mpsc::channel();
        let thread = std::thread::Builder::new().name("signals".into());
        let failed = |e: &dyn std::fmt::Display| {
            CtlError::failed(format!("signals cannot be listened to: {e}"), "")
        };
        thread.spawn(move || listen(&wanted, &tell)).map_err(|e| failed(&e))?;
        match told.recv() {
            Ok(Ok(())) => Ok(stop),
            Ok(Err(error)) => Err(failed(&error)),
            Err(error) => Err(failed(&error)),
        }
    }

    pub(super) fn is_wanted(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Waits, unless it is wanted to stop.
    ///
    /// # Errors
    /// `Interrupted`.
    pub(super) fn wait(&self, time: Duration) -> CtlResult<()> {
        let since = Instant::now();
        loop {
            self.check()?;
            let left = time.saturating_sub(since.elapsed());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(TICK));
        }
    }

    /// # Errors
    /// `Interrupted` where it is wanted to stop.
    pub(super) fn check(&self) -> CtlResult<()> {
        match self.is_wanted() {
            true => Err(CtlError::new(Kind::Interrupted, "interrupted", "")),
            false => Ok(()),
        }
    }
}

fn listen(wanted: &Stop, tell: &mpsc::Sender<std::io::Result<()>>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            // Whoever waits for the answer is told; nobody else is there.
            let _ = tell.send(Err(error));
            return;
        }
    };
    runtime.block_on(async {
        let both = signal(SignalKind::interrupt())
            .and_then(|interrupt| Ok((interrupt, signal(SignalKind::terminate())?)));
        let (mut interrupt, mut terminate) = match both {
            Ok(both) => both,
            Err(error) => {
                let _ = tell.send(Err(error));
                return;
            }
        };
        let _ = tell.send(Ok(()));
        loop {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            if wanted.0.swap(true, Ordering::Relaxed) {
                std::process::exit(i32::from(INTERRUPTED));
            }
        }
    });
}
