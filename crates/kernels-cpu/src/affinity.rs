//! Which cores the pool may use, and pinning a thread to one. Failure is no error: an unpinned
//! thread is only slower.
#![cfg_attr(
    target_os = "linux",
    expect(unsafe_code, reason = "sched_getaffinity and sched_setaffinity")
)]

/// A logical CPU as the operating system numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Core(usize);

/// One logical CPU of every physical core that this process may run on, no more than its CPU quota
/// allows. Empty where the system does not tell.
pub(crate) fn cores() -> Vec<Core> {
    let mut cores: Vec<Core> =
        allowed().into_iter().filter(|&core| is_first_sibling(core)).collect();
    if let Ok(quota) = std::thread::available_parallelism() {
        cores.truncate(quota.get());
    }
    cores
}

/// The CPUs of `siblings` lists look like `0,64` or `0-1`; the first one stands for the core.
fn is_first_sibling(core: Core) -> bool {
    let path = format!("/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list", core.0);
    match std::fs::read_to_string(path) {
        Ok(list) => {
            let first = list.trim().split([',', '-']).next().and_then(|n| n.parse().ok());
            first.is_none_or(|first: usize| first == core.0)
        }
        Err(_) => true,
    }
}

#[cfg(target_os = "linux")]
fn allowed() -> Vec<Core> {
    let mut set = empty_set();
    // SAFETY: `set` is a whole `cpu_set_t`, and its size is passed with it; 0 is this thread.
    let result = unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut set) };
    if result != 0 {
        return Vec::new();
    }
    let limit = usize::try_from(libc::CPU_SETSIZE).unwrap_or(0);
    // SAFETY: `index` is below CPU_SETSIZE, the number of bits of the set.
    (0..limit).filter(|&index| unsafe { libc::CPU_ISSET(index, &set) }).map(Core).collect()
}

#[cfg(not(target_os = "linux"))]
fn allowed() -> Vec<Core> {
    Vec::new()
}

/// Pins the calling thread.
#[cfg(target_os = "linux")]
pub(crate) fn pin(core: Core) {
    let mut set = empty_set();
    // SAFETY: the index came from `allowed`, so it is below CPU_SETSIZE.
    unsafe { libc::CPU_SET(core.0, &mut set) };
    // SAFETY: `set` is a whole `cpu_set_t`, and its size is passed with it; 0 is this thread. A
    // refusal leaves the thread where it was.
    unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set) };
}

/// Pins the calling thread where the system can.
#[cfg(not(target_os = "linux"))]
pub(crate) fn pin(_core: Core) {}

#[cfg(target_os = "linux")]
fn empty_set() -> libc::cpu_set_t {
    // SAFETY: `cpu_set_t` is an array of integers, for which all zero bits are a value.
    unsafe { std::mem::zeroed() }
}
