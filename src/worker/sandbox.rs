//! What a worker may still do once it runs: read what it has open, answer, and end.
//!
//! Everything is in force before the first byte of a guest's disk is read. Landlock and seccomp are
//! used where the kernel has them; what is in force is told.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::RawFd;

use landlock::{ABI, Access, AccessFs, AccessNet, Ruleset, RulesetAttr, RulesetStatus, Scope};
use rustix::process::{DumpableBehavior, Gid, Resource, Rlimit, Signal, Uid};
use seccompiler::{
    SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};
use serde::{Deserialize, Serialize};

/// User and group without any rights.
const NOBODY: u32 = 65534;
/// Descriptors that a worker may have: those of a chain of 256 files for each of some disks, and its own.
pub(super) const DESCRIPTORS: u64 = 4096;
/// How far others' work comes first.
const NICE: i32 = 5;
/// How gladly the kernel ends it where memory runs out: before all others.
const FIRST_TO_GO: &str = "1000";
/// Seconds of CPU in all: a day. What runs in circles is ended by the deadline of its request; this ends
/// what nobody asks any more.
const CPU: u64 = 24 * 3600;
/// Descriptors 0 to 2: the channel, nothing, and the way out for last words.
const OWN: RawFd = 3;

/// What holds a worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sandbox {
    /// System calls beyond those it needs end it.
    pub seccomp: bool,
    /// It can reach no file by a name, and no network.
    pub landlock: bool,
    /// The user that it runs as.
    pub uid: u32,
}

/// Gives up everything that a worker does not need but for the descriptors `keep`. The process must
/// have one thread only.
///
/// # Errors
/// What cannot be given up, but for Landlock and seccomp on kernels without them. Also where `parent`,
/// a process id, is gone.
pub fn enter(memory: u64, parent: u32, keep: &[RawFd]) -> io::Result<Sandbox> {
    close_others(keep)?;
    // Where memory runs out the kernel is to end this, and not the hub. Before the change of the user,
    // after which the file is another's. Where it cannot be written, `memory` is a bound all the same.
    let _ = std::fs::write("/proc/self/oom_score_adj", FIRST_TO_GO);
    become_nobody()?;
    rustix::thread::set_no_new_privs(true)?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    // After the change of the user, which would clear it. It is the thread that started this process
    // whose end counts.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    let is_there = |pid: rustix::process::Pid| pid.as_raw_nonzero().get().cast_unsigned() == parent;
    if !rustix::process::getppid().is_some_and(is_there) {
        return Err(io::Error::other("whoever started this worker is gone"));
    }
    limit(memory)?;
    rustix::process::nice(NICE)?;
    let uid = rustix::process::getuid().as_raw();
    let landlock = enter_landlock();
    let seccomp = enter_seccomp()?;
    Ok(Sandbox { seccomp, landlock, uid })
}

/// Closes what was inherited by mistake.
fn close_others(keep: &[RawFd]) -> io::Result<()> {
    let mut open = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd")? {
        let number = entry?.file_name().to_str().and_then(|name| name.parse::<RawFd>().ok());
        open.extend(number.filter(|number| *number >= OWN && !keep.contains(number)));
    }
    for number in open {
        // The directory's own descriptor is closed by now.
        let _ = nix::unistd::close(number);
    }
    Ok(())
}

fn become_nobody() -> io::Result<()> {
    if rustix::process::geteuid().is_root() {
        let (user, group) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
        rustix::thread::set_thread_groups(&[])?;
        rustix::thread::set_thread_res_gid(group, group, group)?;
        rustix::thread::set_thread_res_uid(user, user, user)?;
    }
    Ok(())
}

fn limit(memory: u64) -> io::Result<()> {
    let limits = [
        (Resource::As, memory),
        (Resource::Nofile, DESCRIPTORS),
        (Resource::Cpu, CPU),
        (Resource::Nproc, 0),
        (Resource::Fsize, 0),
        (Resource::Core, 0),
        (Resource::Memlock, 0),
    ];
    for (resource, value) in limits {
        let most = rustix::process::getrlimit(resource).maximum;
        let value = Some(most.map_or(value, |most| most.min(value)));
        rustix::process::setrlimit(resource, Rlimit { current: value, maximum: value })?;
    }
    Ok(())
}

/// Denies every file name, every port, and signals and sockets of others, as far as the kernel can.
fn enter_landlock() -> bool {
    let newest = ABI::V6;
    let restrict = || -> Result<_, landlock::RulesetError> {
        Ruleset::default()
            .handle_access(AccessFs::from_all(newest))?
            .handle_access(AccessNet::from_all(newest))?
            .scope(Scope::from_all(newest))?
            .create()?
            .restrict_self()
    };
    restrict().is_ok_and(|status| status.ruleset != RulesetStatus::NotEnforced)
}

/// Calls that are let through whatever they are given: they reach nothing but what is open, and memory.
const CALLS: [libc::c_long; 29] = [
    libc::SYS_read,
    libc::SYS_pread64,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_fadvise64,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_close,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_clock_gettime,
    libc::SYS_restart_syscall,
    libc::SYS_getrandom,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// Ends the process at any call that is not needed. Whether the kernel can do that.
fn enter_seccomp() -> io::Result<bool> {
    let failed = |e: seccompiler::BackendError| io::Error::other(e.to_string());
    let when = |argument, operator, value| {
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)
            .and_then(|condition| SeccompRule::new(vec![condition]))
            .map(|rule| vec![rule])
            .map_err(failed)
    };
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        CALLS.iter().map(|number| (*number, Vec::new())).collect();
    // No memory that can be run is ever made.
    let executable = u64::from(libc::PROT_EXEC.cast_unsigned());
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, when(2, SeccompCmpOp::MaskedEq(executable), 0)?);
    }
    // An abort, which is a signal to itself.
    rules.insert(libc::SYS_tgkill, when(0, SeccompCmpOp::Eq, u64::from(std::process::id()))?);
    let Ok(target) = std::env::consts::ARCH.try_into() else {
        return Ok(false);
    };
    let (mismatch, found) = (SeccompAction::KillProcess, SeccompAction::Allow);
    let filter = SeccompFilter::new(rules, mismatch, found, target).map_err(failed)?;
    let program: seccompiler::BpfProgram = filter.try_into().map_err(failed)?;
    match seccompiler::apply_filter(&program) {
        Ok(()) => Ok(true),
        Err(seccompiler::Error::Prctl(_) | seccompiler::Error::Seccomp(_)) => Ok(false),
        Err(error) => Err(io::Error::other(error.to_string())),
    }
}
