use super::*;

fn kernels(dir: &Path) -> (Kernels, Home) {
    let sm = Sm::builder().below(dir).build().unwrap();
    (sm.kernels(), sm.home().clone())
}

fn kernel_file(path: &Path) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let mut bytes = vec![0; 0x300];
    bytes[..4].copy_from_slice(b"\x7fELF");
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn dependencies_come_first_and_once() {
    let dep = "k/erofs.ko: k/crc.ko k/lz4.ko\nk/crc.ko:\nk/lz4.ko: k/crc.ko\n\
               k/overlay.ko.xz:\nk/other.ko: k/crc.ko\n";
    assert_eq!(
        load_order(dep, &["erofs", "absent", "overlay"]),
        ["k/crc.ko", "k/lz4.ko", "k/erofs.ko", "k/overlay.ko.xz"]
    );
}

#[test]
fn circular_dependencies_end() {
    assert_eq!(load_order("a.ko: b.ko\nb.ko: a.ko\n", &["a"]).len(), 2);
}

#[test]
fn an_explicit_kernel_is_checked() {
    let dir = tempfile::tempdir().unwrap();
    let (kernels, _) = kernels(dir.path());
    let error = kernels.find(Some(Path::new("/no/kernel"))).unwrap_err();
    assert!(error.to_string().contains("\"/no/kernel\""), "{error}");
    let text = dir.path().join("text");
    std::fs::write(&text, vec![b'x'; 4096]).unwrap();
    let error = kernels.find(Some(&text)).unwrap_err();
    assert!(error.to_string().contains("neither"), "{error}");
}

#[test]
fn the_embedded_kernel_comes_before_built_ones_and_behind_a_choice() {
    let dir = tempfile::tempdir().unwrap();
    let (kernels, home) = kernels(dir.path());
    kernel_file(&home.cache().join("kernels/6.12-abc/vmlinux"));
    let (zstd, digest) = embedded::tests::packed();
    let packed = Some(Packed {
        zstd: &zstd,
        digest: &digest,
    });
    let found = kernels.find_with(None, packed).unwrap();
    assert!(found.path.starts_with(home.cache().join("embedded")));
    let managed = home.kernels().join("managed/vmlinux");
    kernel_file(&managed);
    assert_eq!(kernels.find_with(None, packed).unwrap().path, managed);
    std::fs::remove_file(managed).unwrap();
    let current = |listed: Vec<ListedKernel>| {
        let current = listed.into_iter().find(|kernel| kernel.current);
        current.unwrap().name
    };
    assert_eq!(current(kernels.list_with(packed)), "embedded");

    choose_with(&home, "6.12-abc", packed).unwrap();
    assert_eq!(current(kernels.list_with(packed)), "6.12-abc");
    std::fs::remove_dir_all(home.cache().join("embedded")).unwrap();
    assert_eq!(choose_with(&home, "embedded", packed).unwrap(), found);
    assert_eq!(current(kernels.list_with(packed)), "embedded");

    // A cache that cannot be written is an error, not a reason for another kernel.
    std::fs::remove_file(home.kernels().join("current")).unwrap();
    std::fs::remove_dir_all(home.cache().join("embedded")).unwrap();
    std::fs::write(home.cache().join("embedded"), b"").unwrap();
    let error = kernels.find_with(None, packed).unwrap_err();
    assert!(matches!(error, KernelError::Unpack { .. }), "{error}");
}

#[test]
fn built_kernels_are_found_and_one_can_be_chosen() {
    let dir = tempfile::tempdir().unwrap();
    let (kernels, home) = kernels(dir.path());
    let built = home.cache().join("kernels/6.12-abc/vmlinux");
    kernel_file(&built);
    let other = dir.path().join("mine");
    kernel_file(&other);
    assert_eq!(candidates(&home)[0].1, built);
    assert_eq!(kernels.choose("6.12-abc").unwrap().path, built);
    assert!(kernels.list()[0].current);
    let other = other.to_str().unwrap();
    assert_eq!(kernels.choose(other).unwrap().path, Path::new(other));
    assert_eq!(
        usable(&home.kernels().join("current")).unwrap().path,
        Path::new(other)
    );
}

#[test]
fn the_newest_of_a_distributions_kernels_comes_first() {
    let dir = tempfile::tempdir().unwrap();
    let versions = [
        "6.10.0-1-amd64",
        "6.1.0-30-amd64",
        "6.1.0-9-amd64",
        "6.1~rc3-amd64",
        "6.1~rc2-amd64",
        "5.10.0-33-amd64",
    ];
    for name in ["config-6.12", "initrd.img-6.12", "vmlinuz"] {
        std::fs::write(dir.path().join(name), "").unwrap();
    }
    for version in versions {
        std::fs::write(dir.path().join(format!("vmlinuz-{version}")), "").unwrap();
    }
    let found = stock(dir.path()).into_iter().map(|(name, _)| name);
    let found: Vec<_> = found.collect();
    assert_eq!(found, versions.map(|version| format!("vmlinuz-{version}")));
    assert_eq!(by_version("6.01", "6.1"), Ordering::Equal);
    assert_eq!(by_version("6.1", "6.1-rt"), Ordering::Less);
}

/// Ubuntu's kernels are readable by root only; others are truncated or dangling
/// links.
#[test]
fn unusable_kernels_are_skipped_unless_requested() {
    let dir = tempfile::tempdir().unwrap();
    let [absent, short, good] = ["absent", "short", "good"].map(|name| dir.path().join(name));
    std::fs::write(&short, "x").unwrap();
    kernel_file(&good);
    let all = [&absent, &short, &good];
    let found = first_usable(all.iter().map(|path| path.as_path())).unwrap();
    assert_eq!(found.path, good);
    // No kernel is usable: the error is that of the preferred one.
    let error = first_usable(all[..2].iter().map(|path| path.as_path())).unwrap_err();
    assert!(error.to_string().contains("absent"), "{error}");
    let error = first_usable(std::iter::empty()).unwrap_err();
    assert!(matches!(error, KernelError::None));
}

#[test]
fn modules_are_found_next_to_a_distribution_kernel() {
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join("boot/vmlinuz-6.1");
    kernel_file(&kernel);
    assert_eq!(modules_directory(&kernel), None);
    let modules = dir.path().join("lib/modules/6.1");
    std::fs::create_dir_all(&modules).unwrap();
    std::fs::write(modules.join("modules.dep"), "k/erofs.ko:\n").unwrap();
    std::fs::create_dir(modules.join("k")).unwrap();
    std::fs::write(modules.join("k/erofs.ko"), "module").unwrap();
    let found = usable(&kernel).unwrap();
    assert_eq!(found.modules.as_deref(), Some(modules.as_path()));
    assert_eq!(found.read_modules().unwrap()[0].name, "erofs.ko");
}
