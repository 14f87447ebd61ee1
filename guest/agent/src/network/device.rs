//! The network device: its driver is bound and unbound by files of sysfs, which removes its
//! interface from the guest, and creates another.

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, Dir, Mode, OFlags, openat, statat};
use rustix::io::Errno;

use crate::log;

/// Directory of the driver, with a link to each of its devices.
const DRIVER: &str = "/sys/bus/virtio/drivers/virtio_net";
/// Directory of all devices of the bus.
const DEVICES: &str = "/sys/bus/virtio/devices";
/// Directory of settings of IPv6, one directory for each interface.
const IPV6: &str = "/proc/sys/net/ipv6/conf";

const DIRECTORY: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// A device whose driver is virtio_net. Its directories are open, so that no path is resolved
/// later.
#[derive(Debug)]
pub(crate) struct NetDevice {
    /// Its name on the bus, such as `virtio4`.
    name: String,
    directory: OwnedFd,
    driver: OwnedFd,
    ipv6: Option<OwnedFd>,
}

/// An interface of this process's network namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Interface {
    pub(super) index: u32,
    pub(super) name: String,
}

impl NetDevice {
    /// Returns the first device that the kernel has bound to the driver; `None` if there is
    /// none.
    ///
    /// # Errors
    /// sysfs cannot be read.
    pub(crate) fn find() -> io::Result<Option<Self>> {
        let found = Self::find_in(Path::new(DRIVER), Path::new(DEVICES), Path::new(IPV6))?;
        if let Some(device) = &found {
            log::note_failure("set up the network device", device.quiet());
        }
        Ok(found)
    }

    fn find_in(driver: &Path, devices: &Path, ipv6: &Path) -> io::Result<Option<Self>> {
        let entries = match std::fs::read_dir(driver) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            entries => entries?,
        };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        // `bind`, `unbind`, `uevent` and `module` are its other entries.
        let Some(name) = names.filter(|name| name.starts_with("virtio")).min() else {
            return Ok(None);
        };
        let open = |path: &Path| rustix::fs::open(path, DIRECTORY, Mode::empty());
        Ok(Some(Self {
            directory: open(&devices.join(&name))?,
            driver: open(driver)?,
            ipv6: open(ipv6).ok(),
            name,
        }))
    }

    /// Returns the device's interface; `None` if there is none, or if it was moved to another
    /// network namespace.
    pub(super) fn interface(&self) -> io::Result<Option<Interface>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = match openat(&self.directory, c"net", flags, Mode::empty()) {
            Err(Errno::NOENT) => return Ok(None),
            directory => directory?,
        };
        for entry in Dir::read_from(&directory)? {
            let entry = entry?;
            let Ok(name) = entry.file_name().to_str() else {
                continue;
            };
            if matches!(name, "." | "..") {
                continue;
            }
            let index = read(&directory, &format!("{name}/ifindex"))?;
            return Ok(Some(Interface {
                index: index.parse().map_err(|_| io::ErrorKind::InvalidData)?,
                name: name.to_owned(),
            }));
        }
        Ok(None)
    }

    /// Returns the MAC address of its interface.
    pub(super) fn mac(&self, interface: &Interface) -> io::Result<String> {
        read(&self.directory, &format!("net/{}/address", interface.name))
    }

    /// Returns true if its interface, which is up, has a link. Its state is unknown, and true
    /// here, if the interface was renamed.
    pub(super) fn has_link(&self, interface: &Interface) -> bool {
        let carrier = read(&self.directory, &format!("net/{}/carrier", interface.name));
        carrier.map_or(true, |carrier| carrier == "1")
    }

    /// Returns the descriptors that a forked process must keep open to use the device.
    pub(crate) fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        [self.directory.as_fd(), self.driver.as_fd()].into_iter()
    }

    /// Binds the driver, which creates an interface, and returns it.
    pub(super) fn bind(&self) -> io::Result<Interface> {
        self.write(c"bind")?;
        log::note_failure("set up the network device", self.quiet());
        self.interface()?
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Unbinds the driver, if it is bound. Its interface is gone afterwards, wherever it was.
    pub(super) fn unbind(&self) -> io::Result<()> {
        match statat(&self.directory, c"driver", AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => Ok(()),
            _ => self.write(c"unbind"),
        }
    }

    /// Writes the device's name to a file of its driver.
    fn write(&self, file: &CStr) -> io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        let file = openat(&self.driver, file, flags, Mode::empty())?;
        File::from(file).write_all(self.name.as_bytes())
    }

    /// Stops the kernel from accepting addresses and routes of IPv6 by itself: other VMs of a
    /// network could announce some. A workload may permit it again.
    fn quiet(&self) -> io::Result<()> {
        let (Some(ipv6), Some(interface)) = (&self.ipv6, self.interface()?) else {
            return Ok(());
        };
        for setting in ["accept_ra", "autoconf"] {
            let flags = OFlags::WRONLY | OFlags::CLOEXEC;
            let path = format!("{}/{setting}", interface.name);
            let file = openat(ipv6, path, flags, Mode::empty())?;
            File::from(file).write_all(b"0")?;
        }
        Ok(())
    }
}

/// Returns the contents of a small file without the white space around them.
fn read(directory: impl AsFd, path: &str) -> io::Result<String> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let file = File::from(openat(directory, path, flags, Mode::empty())?);
    let mut text = String::new();
    file.take(256).read_to_string(&mut text)?;
    Ok(text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    /// Directories as those of sysfs and of settings.
    struct Files(tempfile::TempDir);

    impl Files {
        fn new() -> Self {
            let files = Self(tempfile::tempdir().unwrap());
            for path in ["driver", "devices/virtio4/net/eth0", "ipv6/eth0"] {
                fs::create_dir_all(files.path(path)).unwrap();
            }
            symlink("../devices/virtio4", files.path("driver/virtio4")).unwrap();
            symlink("../../driver", files.path("devices/virtio4/driver")).unwrap();
            for (path, text) in [
                ("driver/bind", ""),
                ("driver/unbind", ""),
                ("devices/virtio4/net/eth0/ifindex", "2\n"),
                ("devices/virtio4/net/eth0/address", "02:00:00:00:00:02\n"),
                ("devices/virtio4/net/eth0/carrier", "1\n"),
                ("ipv6/eth0/accept_ra", "1"),
                ("ipv6/eth0/autoconf", "1"),
            ] {
                fs::write(files.path(path), text).unwrap();
            }
            files
        }

        fn path(&self, path: &str) -> std::path::PathBuf {
            self.0.path().join(path)
        }

        fn text(&self, path: &str) -> String {
            fs::read_to_string(self.path(path)).unwrap()
        }

        fn find(&self) -> Option<NetDevice> {
            let [driver, devices, ipv6] = ["driver", "devices", "ipv6"].map(|path| self.path(path));
            NetDevice::find_in(&driver, &devices, &ipv6).unwrap()
        }
    }

    #[test]
    fn a_machine_may_have_no_device_or_no_driver() {
        let files = Files::new();
        assert!(files.find().is_some());
        fs::remove_file(files.path("driver/virtio4")).unwrap();
        assert!(files.find().is_none());
        fs::remove_dir_all(files.path("driver")).unwrap();
        assert!(files.find().is_none());
    }

    #[test]
    fn an_interface_is_found_by_its_device() {
        let files = Files::new();
        let device = files.find().unwrap();
        let interface = device.interface().unwrap().unwrap();
        assert_eq!((interface.index, interface.name.as_str()), (2, "eth0"));
        assert_eq!(device.mac(&interface).unwrap(), "02:00:00:00:00:02");
        assert!(device.has_link(&interface));
        fs::write(files.path("devices/virtio4/net/eth0/carrier"), "0\n").unwrap();
        assert!(!device.has_link(&interface));
        // It has another name now.
        let net = files.path("devices/virtio4/net");
        fs::rename(net.join("eth0"), net.join("wan")).unwrap();
        assert_eq!(device.interface().unwrap().unwrap().name, "wan");
        // It is in another namespace.
        fs::remove_dir_all(net.join("wan")).unwrap();
        assert_eq!(device.interface().unwrap(), None);
        // It is unbound.
        fs::remove_dir(net).unwrap();
        assert_eq!(device.interface().unwrap(), None);
    }

    #[test]
    fn a_driver_is_bound_and_unbound() {
        let files = Files::new();
        let device = files.find().unwrap();
        device.unbind().unwrap();
        assert_eq!(files.text("driver/unbind"), "virtio4");
        assert_eq!(device.bind().unwrap().index, 2);
        assert_eq!(files.text("driver/bind"), "virtio4");
        for setting in ["ipv6/eth0/accept_ra", "ipv6/eth0/autoconf"] {
            assert_eq!(files.text(setting), "0", "{setting}");
        }
        // A device that is not bound is not unbound, which would be an error.
        fs::remove_file(files.path("devices/virtio4/driver")).unwrap();
        fs::remove_file(files.path("driver/unbind")).unwrap();
        device.unbind().unwrap();
        assert_eq!(apply_none(&device), "");
    }

    fn apply_none(device: &NetDevice) -> String {
        let applied = crate::network::apply(Some(device), None);
        applied
            .err()
            .map(|error| error.to_string())
            .unwrap_or_default()
    }
}
