//! Guest kernels of this host, and the modules that a distribution's kernel needs.

mod embedded;

use std::cmp::Ordering;
use std::collections::{HashMap, HashSet};
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use self::embedded::Packed;
use crate::Error;
use crate::home::Home;
use crate::initramfs::Module;
use crate::sm::Sm;

/// Modules that a guest may need, by their names in `modules.dep`; those that a kernel
/// has built in, or does not have, are skipped.
const GUEST_MODULES: [&str; 13] = [
    // erofs needs libcrc32c, which requests this from the crypto API by name.
    "crc32c_generic",
    "virtio_mmio",
    "virtio_balloon",
    "virtio_blk",
    "virtio_net",
    "virtio-rng",
    "virtio_rng",
    "vmw_vsock_virtio_transport",
    "erofs",
    "overlay",
    "ext4",
    "vmgenid",
    "virtiofs",
];

/// Largest module read, in bytes.
const MAX_MODULE: u64 = 16 << 20;

/// An error of selecting a kernel.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum KernelError {
    /// No kernel was found.
    #[error("no guest kernel found")]
    None,
    /// The requested kernel cannot be used.
    #[error("cannot use kernel {path:?}: {reason}")]
    Unusable {
        /// The file.
        path: PathBuf,
        /// The cause.
        reason: String,
    },
    /// The kernel embedded in this program cannot be unpacked.
    #[error("cannot unpack the embedded kernel below {path:?}")]
    Unpack {
        /// The cache directory.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A kernel's modules cannot be read.
    #[error("cannot read kernel module {path:?}")]
    Module {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The selection cannot be stored.
    #[error("cannot make {path:?} the kernel to use")]
    Use {
        /// The kernel.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// A kernel and the directory of its modules, if it has any.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Kernel {
    /// The image: ELF, bzImage.
    pub path: PathBuf,
    /// A directory with `modules.dep`.
    pub modules: Option<PathBuf>,
}

/// A usable kernel of this host.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct ListedKernel {
    /// Its name for [`Kernels::choose`].
    pub name: String,
    /// The image.
    pub path: PathBuf,
    /// True for the kernel that is booted by default.
    pub current: bool,
}

/// The guest kernels of this host; see [`Sm::kernels`].
#[derive(Clone, Debug)]
pub struct Kernels {
    sm: Sm,
}

impl Sm {
    /// Returns the guest kernels of this host.
    #[must_use]
    pub fn kernels(&self) -> Kernels {
        Kernels { sm: self.clone() }
    }
}

impl Kernels {
    /// Returns the kernel of VMs whose options name none: that of
    /// [`crate::SmBuilder::kernel`], else the one selected with [`Self::choose`], else the
    /// newest one in the data directory, else the one embedded in this program, else the
    /// newest one built, else the newest one in `/boot`. Unusable kernels are skipped
    /// unless they were selected.
    ///
    /// # Errors
    /// The selected kernel is unusable, the embedded one cannot be unpacked, or no kernel
    /// is usable.
    pub fn current(&self) -> Result<Kernel, Error> {
        Ok(self.find(None)?)
    }

    /// Returns all kernels known on this host, including the one that is booted by
    /// default.
    #[must_use]
    pub fn list(&self) -> Vec<ListedKernel> {
        self.list_with(embedded::EMBEDDED)
    }

    /// Selects the kernel (a path, or a name from [`Self::list`]) that is booted by
    /// default.
    ///
    /// # Errors
    /// The kernel is unusable, or the selection cannot be stored.
    pub fn choose(&self, kernel: &str) -> Result<Kernel, Error> {
        Ok(choose_with(self.sm.home(), kernel, embedded::EMBEDDED)?)
    }

    /// Returns the kernel at `explicit`, else that of [`Self::current`].
    pub(crate) fn find(&self, explicit: Option<&Path>) -> Result<Kernel, KernelError> {
        self.find_with(explicit, embedded::EMBEDDED)
    }

    fn find_with(
        &self,
        explicit: Option<&Path>,
        packed: Option<Packed<'_>>,
    ) -> Result<Kernel, KernelError> {
        if let Some(path) = explicit.or_else(|| self.sm.kernel()) {
            return usable(path);
        }
        let home = self.sm.home();
        let current = home.kernels().join("current");
        if current.symlink_metadata().is_ok() {
            return usable(&current);
        }
        if let Some(packed) = packed {
            let managed = images(&home.kernels());
            return first_usable(managed.iter().map(|(_, path)| path.as_path()))
                .or_else(|_| usable(&unpacked(home, packed)?));
        }
        let found = candidates(home);
        first_usable(found.iter().map(|(_, path)| path.as_path()))
    }

    fn list_with(&self, packed: Option<Packed<'_>>) -> Vec<ListedKernel> {
        let current = self.find_with(None, packed).ok().map(|kernel| kernel.path);
        let is_current = |path: &Path| {
            let path = path.canonicalize();
            path.is_ok_and(|path| current.as_ref() == Some(&path))
        };
        let home = self.sm.home();
        let embedded = packed.map(|packed| {
            let path = embedded::path(packed, home.cache());
            (embedded::NAME.to_owned(), path)
        });
        let mut listed: Vec<_> = embedded
            .into_iter()
            .chain(candidates(home))
            .map(|(name, path)| ListedKernel {
                current: is_current(&path),
                name,
                path,
            })
            .collect();
        // A kernel from another directory is named by its path.
        if let Some(path) = current
            && !listed.iter().any(|kernel| kernel.current)
        {
            let chosen = ListedKernel {
                name: path.display().to_string(),
                path,
                current: true,
            };
            listed.insert(0, chosen);
        }
        listed
    }
}

fn unpacked(home: &Home, packed: Packed<'_>) -> Result<PathBuf, KernelError> {
    embedded::unpacked(packed, home.cache()).map_err(|source| KernelError::Unpack {
        path: home.cache().to_owned(),
        source,
    })
}

/// Returns the first usable kernel, or the error of the first one.
fn first_usable<'a>(paths: impl Iterator<Item = &'a Path>) -> Result<Kernel, KernelError> {
    let mut first_error = None;
    for path in paths {
        match usable(path) {
            Ok(kernel) => return Ok(kernel),
            Err(error) => {
                tracing::debug!(%error, "a kernel is skipped");
                first_error = first_error.or(Some(error));
            }
        }
    }
    Err(first_error.unwrap_or(KernelError::None))
}

fn choose_with(
    home: &Home,
    kernel: &str,
    packed: Option<Packed<'_>>,
) -> Result<Kernel, KernelError> {
    let listed = candidates(home)
        .into_iter()
        .find(|(name, _)| name == kernel);
    let path = match (packed, listed) {
        (Some(packed), _) if kernel == embedded::NAME => unpacked(home, packed)?,
        (_, Some((_, path))) => path,
        (_, None) => PathBuf::from(kernel),
    };
    let found = usable(&path)?;
    let record = || {
        let directory = home.kernels();
        std::fs::create_dir_all(&directory)?;
        let fresh = directory.join(format!(".current-{}", std::process::id()));
        let _ = std::fs::remove_file(&fresh);
        std::os::unix::fs::symlink(&found.path, &fresh)?;
        std::fs::rename(&fresh, directory.join("current"))
    };
    record().map_err(|source| KernelError::Use {
        path: found.path.clone(),
        source,
    })?;
    Ok(found)
}

/// Returns names and images in order of preference: managed ones, built ones (the newest
/// first), the distribution's.
fn candidates(home: &Home) -> Vec<(String, PathBuf)> {
    let mut found = images(&home.kernels());
    found.extend(images(&home.cache().join("kernels")));
    found.extend(stock(Path::new("/boot")));
    found
}

/// Returns the kernels in the directories of `directory`, the newest first.
fn images(directory: &Path) -> Vec<(String, PathBuf)> {
    let mut built: Vec<_> = entries(directory)
        .into_iter()
        .filter_map(|(name, path)| {
            let image = ["vmlinux", "vmlinuz", "bzImage"]
                .iter()
                .map(|file| path.join(file))
                .find(|image| image.is_file())?;
            let age = image.metadata().and_then(|meta| meta.modified()).ok();
            Some((age, name, image))
        })
        .collect();
    built.sort_by_key(|(age, ..)| std::cmp::Reverse(*age));
    let named = built.into_iter().map(|(_, name, image)| (name, image));
    named.collect()
}

/// Returns the distribution's kernels, the newest first.
fn stock(boot: &Path) -> Vec<(String, PathBuf)> {
    let mut found: Vec<_> = entries(boot)
        .into_iter()
        .filter(|(name, _)| name.starts_with("vmlinuz-"))
        .collect();
    found.sort_by(|a, b| by_version(&b.0, &a.0));
    found
}

/// Compares versions like dpkg: numbers by their value, and a tilde before the end
/// (deb-version(7)).
fn by_version(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a.as_bytes(), b.as_bytes());
    let rank = |byte: Option<&u8>| match byte {
        Some(b'~') => -1,
        None => 0,
        Some(&byte) => i32::from(byte),
    };
    while !(a.is_empty() && b.is_empty()) {
        let (left, right) = (part(&mut a, false), part(&mut b, false));
        let longest = left.len().max(right.len());
        let text = |side: &[u8]| {
            (0..longest)
                .map(|at| rank(side.get(at)))
                .collect::<Vec<_>>()
        };
        let (left_number, right_number) = (part(&mut a, true), part(&mut b, true));
        let number = |digits: &[u8]| {
            let zeros = digits.iter().take_while(|digit| **digit == b'0').count();
            digits.get(zeros..).unwrap_or_default().to_vec()
        };
        let (low, high) = (number(left_number), number(right_number));
        let order = text(left)
            .cmp(&text(right))
            .then(low.len().cmp(&high.len()))
            .then(low.cmp(&high));
        if order.is_ne() {
            return order;
        }
    }
    Ordering::Equal
}

/// Takes the leading digits, or the bytes before the next digit.
fn part<'a>(bytes: &mut &'a [u8], digits: bool) -> &'a [u8] {
    let is_part = |byte: &&u8| byte.is_ascii_digit() == digits;
    let len = bytes.iter().take_while(is_part).count();
    let (taken, rest) = bytes.split_at(len);
    *bytes = rest;
    taken
}

fn entries(directory: &Path) -> Vec<(String, PathBuf)> {
    let Ok(entries) = std::fs::read_dir(directory) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path())))
        .filter(|(name, _)| !name.starts_with('.') && name != "current")
        .collect()
}

fn usable(path: &Path) -> Result<Kernel, KernelError> {
    let unusable = |reason: String| KernelError::Unusable {
        path: path.to_owned(),
        reason,
    };
    let real = path
        .canonicalize()
        .map_err(|error| unusable(error.to_string()))?;
    let mut file = std::fs::File::open(&real).map_err(|error| unusable(error.to_string()))?;
    let mut head = [0; 0x206];
    io::Read::read_exact(&mut file, &mut head)
        .map_err(|_| unusable("it is too short to be a kernel".to_owned()))?;
    let is_elf = head.starts_with(b"\x7fELF");
    // The boot protocol's magic (Linux Documentation/arch/x86/boot.rst).
    let is_bzimage = head.get(0x202..0x206) == Some(b"HdrS");
    if !is_elf && !is_bzimage {
        return Err(unusable(
            "it is neither an ELF file nor a bzImage".to_owned(),
        ));
    }
    Ok(Kernel {
        modules: modules_directory(&real),
        path: real,
    })
}

/// Returns `modules/` next to the kernel, or `/lib/modules/VERSION` for `vmlinuz-VERSION`
/// (also relative to the tree of the kernel's `boot/`).
fn modules_directory(kernel: &Path) -> Option<PathBuf> {
    let directory = kernel.parent()?;
    let mut directories = vec![directory.join("modules")];
    let version = kernel
        .file_name()
        .and_then(|name| name.to_str())
        .and_then(|name| name.strip_prefix("vmlinuz-"));
    if let Some(version) = version {
        let below = |root: &Path| root.join("lib/modules").join(version);
        directories.extend(directory.parent().map(below));
        directories.push(below(directory));
        directories.push(below(Path::new("/")));
    }
    directories
        .into_iter()
        .find(|directory| directory.join("modules.dep").is_file())
}

impl Kernel {
    /// Reads the modules that a guest needs, dependencies first.
    pub(crate) fn read_modules(&self) -> Result<Vec<Module>, KernelError> {
        let Some(directory) = &self.modules else {
            return Ok(Vec::new());
        };
        let path = directory.join("modules.dep");
        let text = std::fs::read_to_string(&path)
            .map_err(|source| KernelError::Module { path, source })?;
        let mut modules = Vec::new();
        for relative in load_order(&text, &GUEST_MODULES) {
            let path = directory.join(relative);
            let module = read_module(&path).map_err(|source| KernelError::Module {
                path: path.clone(),
                source,
            })?;
            modules.push(module);
        }
        Ok(modules)
    }
}

fn read_module(path: &Path) -> io::Result<Module> {
    let name = path.file_name().and_then(|name| name.to_str());
    if path.metadata()?.len() > MAX_MODULE {
        return Err(io::Error::other("it is too large to be a kernel module"));
    }
    Ok(Module {
        name: name.unwrap_or_default().to_owned(),
        bytes: std::fs::read(path)?,
    })
}

/// Returns the paths of the wanted modules and all their dependencies, in load order.
/// `modules.dep` lists the dependencies of each module.
fn load_order<'a>(modules_dep: &'a str, wanted: &[&str]) -> Vec<&'a str> {
    let needs: HashMap<&str, Vec<&str>> = modules_dep
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(module, needs)| (module, needs.split_whitespace().collect()))
        .collect();
    let mut order = Vec::new();
    let mut seen = HashSet::new();
    for name in wanted {
        let module = needs.keys().find(|path| module_name(path) == *name);
        if let Some(module) = module {
            visit(module, &needs, &mut seen, &mut order);
        }
    }
    order
}

fn visit<'a>(
    module: &'a str,
    needs: &HashMap<&'a str, Vec<&'a str>>,
    seen: &mut HashSet<&'a str>,
    order: &mut Vec<&'a str>,
) {
    if !seen.insert(module) {
        return;
    }
    for needed in needs.get(module).into_iter().flatten() {
        visit(needed, needs, seen, order);
    }
    order.push(module);
}

/// Returns `virtio_blk` for `kernel/drivers/block/virtio_blk.ko.xz`.
fn module_name(path: &str) -> &str {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file)
}

#[cfg(test)]
mod tests;
