//! Advice for hosts on which creating a VM takes long.

/// Returns advice about the cgroups of this host. In Linux 6.1, KVM starts a thread for
/// each VM and moves it to the cgroup of the process, which takes a semaphore that is
/// optimised for readers and waits for an RCU grace period. The mount option `favordynmods`
/// optimises it for writers (Firecracker's guide to hosts in production has the same
/// advice). Later kernels may not wait: the caller decides by the measured time.
pub(super) fn advice() -> Option<String> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
    let release = rustix::system::uname();
    let chosen = release.release().to_str().is_ok_and(has_the_choice);
    let point = chosen.then(|| waiting_cgroups(&mounts)).flatten()?;
    Some(format!(
        "\"mount -o remount,favordynmods {point}\" makes it faster"
    ))
}

/// Returns true if a Linux of this release supports `favordynmods`, which is since 6.1.
fn has_the_choice(release: &str) -> bool {
    let mut numbers = release.split('.').map(|number| number.parse().unwrap_or(0));
    (numbers.next(), numbers.next()) >= (Some(6), Some(1))
}

/// Returns the mount point of cgroups of version 2 without `favordynmods` (see `proc(5)`,
/// `/proc/pid/mountinfo`).
fn waiting_cgroups(mountinfo: &str) -> Option<&str> {
    mountinfo.lines().find_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        let mut file_system = file_system.split(' ');
        let is_v2 = file_system.next() == Some("cgroup2");
        let options = file_system.nth(1)?;
        let waits = is_v2 && options.split(',').all(|option| option != "favordynmods");
        waits.then(|| mount.split(' ').nth(4)).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: &str = "21 1 254:1 / / rw,relatime - ext4 /dev/vda1 rw\n";

    #[test]
    fn cgroups_that_wait_are_found() {
        let mounts = format!(
            "{ROOT}28 22 0:25 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
        );
        assert_eq!(waiting_cgroups(&mounts), Some("/sys/fs/cgroup"));
    }

    #[test]
    fn cgroups_that_do_not_wait_need_no_remedy() {
        let favoured = format!(
            "{ROOT}28 22 0:25 / /sys/fs/cgroup rw - cgroup2 none rw,nsdelegate,favordynmods\n"
        );
        assert_eq!(waiting_cgroups(&favoured), None);
        assert_eq!(waiting_cgroups(ROOT), None);
        let first_version = "30 28 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n";
        assert_eq!(waiting_cgroups(first_version), None);
        assert_eq!(waiting_cgroups("what is this - cgroup2"), None);
    }

    #[test]
    fn old_kernels_have_no_choice() {
        assert!(has_the_choice("6.1.0-37-amd64"));
        assert!(has_the_choice("10.0"));
        assert!(!has_the_choice("5.10.0-32-amd64"));
        assert!(!has_the_choice("6"));
        assert!(!has_the_choice(""));
    }
}
