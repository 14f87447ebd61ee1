//! Volumes and other mounts.

use sm_e2e::{Done, Home, Vm, image, unique, until};

struct Named<'a>(&'a Home, String);

impl Drop for Named<'_> {
    fn drop(&mut self) {
        self.0.sm(&["volume", "rm", "-f", &self.1]);
    }
}

fn volume(home: &Home) -> Named<'_> {
    let name = unique("volume");
    let made = home.sm(&["volume", "create", "--size", "1g", &name]);
    assert_eq!(made.exits(0).out().trim(), name);
    Named(home, name)
}

fn run(home: &Home, options: &[&str], script: &str) -> Done {
    let image = image("busybox");
    let run = ["run", "--rm", "-m", "128m"];
    home.sm(&[&run, options, &[&image, "sh", "-c", script]].concat())
}

fn idle<'a>(home: &'a Home, options: &[&str]) -> Vm<'a> {
    let image = image("busybox");
    home.detached(&[options, &["-m", "128m", &image, "sleep", "10000"]].concat())
}

#[test]
fn a_volume_outlives_its_vms() {
    let home = Home::shared();
    let volume = volume(home);
    let data = format!("{}:/data/deep", volume.1);
    let options = ["-v", data.as_str()];
    let script = "echo kept > /data/deep/file; chown 7:8 /data/deep/file; ls -A /data/deep; \
                  df -k /data/deep | tail -n 1 | tr -s ' ' | cut -d ' ' -f 2";
    let out = run(home, &options, script).exits(0).out();
    let lines: Vec<_> = out.lines().collect();
    // No lost+found, which databases refuse.
    assert_eq!(lines[0], "file");
    assert!(lines[1].parse::<u64>().unwrap() > 900 << 10, "{out}");
    let script = "cat /data/deep/file; stat -c %u:%g /data/deep/file; \
                  grep -o ' /data/deep .*nosuid,nodev' /proc/self/mountinfo | wc -l";
    let out = run(home, &options, script).exits(0).out();
    assert_eq!(out, "kept\n7:8\n1\n");
    let read_only = format!("{data}:ro");
    let script = "cat /data/deep/file; echo x > /data/deep/file || echo refused";
    let out = run(home, &["-v", &read_only], script).exits(0).out();
    assert_eq!(out, "kept\nrefused\n");
}

/// As with Docker, mount points are made although the root is read-only.
#[test]
fn a_volume_is_mounted_in_a_read_only_root() {
    let home = Home::shared();
    let volume = volume(home);
    let data = format!("{}:/own/data", volume.1);
    let script = "touch /own/data/x && echo written; touch /own/x || touch /x || ls /own/data";
    let done = run(home, &["--read-only", "-v", &data], script).exits(0);
    assert_eq!(done.out(), "written\nx\n");
}

#[test]
fn a_volume_has_one_writer_or_several_readers() {
    let home = Home::shared();
    let volume = volume(home);
    let data = format!("{}:/data", volume.1);
    let read_only = format!("{data}:ro");
    let writer = idle(home, &["-v", &data]);
    writer.exec(&["sh", "-c", "echo one > /data/file"]).exits(0);
    for other in [&data, &read_only] {
        let error = run(home, &["-v", other], "true").exits(125).err();
        let words = format!("in use by VM \"{}\"", writer.name);
        assert!(error.contains(&words), "{error}");
    }
    let error = home.sm(&["volume", "rm", &volume.1]).exits(1).err();
    assert!(error.contains("in use by VM"), "{error}");
    // Its end writes the disk back.
    home.sm(&["stop", "-t", "0", &writer.name]).exits(0);
    until("the lock is released", || {
        run(home, &["-v", &read_only], "cat /data/file").out() == "one\n"
    });
    let readers = [
        idle(home, &["-v", &read_only]),
        idle(home, &["-v", &read_only]),
    ];
    for reader in &readers {
        assert_eq!(reader.exec(&["cat", "/data/file"]).exits(0).out(), "one\n");
    }
    let error = run(home, &["-v", &data], "true").exits(125).err();
    assert!(error.contains("in use"), "{error}");
    drop(readers);
    until("it can be written again", || {
        run(home, &["-v", &data], "echo two > /data/file").code == Some(0)
    });
    let copy = Named(home, unique("volume"));
    until("it is not in use", || {
        home.sm(&["volume", "clone", &volume.1, &copy.1]).code == Some(0)
    });
    let data = format!("{}:/data", copy.1);
    let out = run(
        home,
        &["-v", &data],
        "cat /data/file; echo three > /data/file",
    );
    assert_eq!(out.exits(0).out(), "two\n");
}

#[test]
fn an_empty_volume_gets_the_images_files() {
    let home = Home::shared();
    let (filled, empty) = (volume(home), volume(home));
    let script = "ls /vol | sort | head -n 1; ls /vol | wc -l; ls /bin | wc -l";
    let script = script.replace("/vol", "/bin");
    let out = run(home, &["-v", &format!("{}:/bin", filled.1)], &script);
    let out = out.exits(0).out();
    let lines: Vec<_> = out.lines().collect();
    assert_eq!(lines[1], lines[2]);
    assert!(lines[1].parse::<u32>().unwrap() > 10, "{out}");
    let mounted = format!("{}:/etc/nothing:nocopy", empty.1);
    let out = run(home, &["-v", &mounted], "ls -A /etc/nothing | wc -l");
    assert_eq!(out.exits(0).out(), "0\n");
}

#[test]
fn memory_and_disks_without_a_name_are_mounted_in_order() {
    let home = Home::shared();
    let options = [
        "--tmpfs",
        "/a/b:size=4m,mode=700",
        "-v",
        "/a",
        "--mount",
        "type=tmpfs,target=/var/run/x,readonly",
    ];
    let script = "stat -c %a /a/b; df -k /a/b | tail -n 1 | tr -s ' ' | cut -d ' ' -f 2; \
                  echo x > /a/file && echo written; touch /var/run/x/y 2>/dev/null || echo refused";
    let out = run(home, &options, script).exits(0).out();
    assert_eq!(out, "700\n4096\nwritten\nrefused\n");
}

#[test]
fn a_clone_has_a_copy_of_its_originals_volume() {
    let home = Home::shared();
    let volume = volume(home);
    let original = idle(home, &["-v", &format!("{}:/data", volume.1)]);
    let sh = |vm: &Vm<'_>, script: &str| vm.exec(&["sh", "-c", script]).exits(0).out();
    sh(&original, "echo one > /data/file");
    let snapshot = unique("volume");
    home.sm(&["snapshot", "create", &original.name, &snapshot])
        .exits(0);
    let clone = home.clone_of(&snapshot, "clone");
    sh(&clone, "echo two > /data/file; sync");
    assert_eq!(sh(&original, "cat /data/file"), "one\n");
    sh(&original, "echo three > /data/file; sync");
    assert_eq!(sh(&clone, "cat /data/file"), "two\n");
    drop(clone);
    home.sm(&["snapshot", "rm", &snapshot]).exits(0);
}

#[test]
fn volumes_of_an_image_are_anonymous_disks() {
    let home = Home::shared();
    let plain = idle(home, &[]);
    let image = format!("volumes-{}:1", unique("image").to_lowercase());
    let targets = (0..9)
        .map(|number| format!("\"/v{number}\""))
        .collect::<Vec<_>>();
    let change = format!("VOLUME [{}, \"/sys/fs/cgroup\"]", targets.join(", "));
    home.sm(&["commit", "-c", &change, &plain.name, &image])
        .exits(0);
    drop(plain);
    let name = unique("volumes");
    let line = [
        "run", "-d", "--name", &name, "-m", "128m", &image, "sleep", "10000",
    ];
    home.sm(&line).exits(0);
    let exec = |script: &str| home.sm(&["exec", &name, "sh", "-c", script]).exits(0).out();
    assert_eq!(
        exec("grep -c '^/dev/vd[c-i] /v' /proc/mounts; echo kept > /v3/file"),
        "7\n"
    );
    let shown = home
        .sm(&["inspect", "-f", "{{json .volumes_in_root}}", &name])
        .exits(0);
    assert_eq!(
        shown.out(),
        "[\"/sys/fs/cgroup\",\"/v7\",\"/v8\"]\n",
        "those beyond the number of disks, and none hides the guest's own"
    );
    let shown = home
        .sm(&["inspect", "-f", "{{json .mounts}}", &name])
        .exits(0)
        .out();
    home.sm(&["stop", "-t", "0", &name]).exits(0);
    home.sm(&["start", &name]).exits(0);
    assert_eq!(exec("cat /v3/file"), "kept\n");
    let listed = || home.sm(&["volume", "ls", "-q"]).exits(0).out();
    let ours: Vec<_> = listed()
        .lines()
        .filter(|volume| shown.contains(volume))
        .map(str::to_owned)
        .collect();
    assert_eq!(ours.len(), 7);
    home.sm(&["rm", "-f", "-v", &name]).exits(0);
    assert!(
        !listed()
            .lines()
            .any(|volume| ours.iter().any(|our| our == volume))
    );
    // Directories that cannot be created are left out, as they are not in the image.
    home.sm(&["run", "--rm", "--read-only", "-m", "128m", &image, "true"])
        .exits(0);
    home.sm(&["rmi", &image]).exits(0);
}

#[test]
fn a_directory_is_shared_by_vms() {
    let home = Home::shared();
    let name = unique("dir");
    home.sm(&["volume", "create", "--type", "dir", &name])
        .exits(0);
    let mount = format!("{name}:/bin");
    let first = idle(home, &["-v", &mount]);
    // The image's files are copied, and an owner stays with its file.
    let script = "ls /bin | grep -c . > /dev/null && echo kept > /bin/file && \
                  chown 999:998 /bin/file && stat -c %u:%g /bin/file /bin";
    let out = home.sm(&["exec", &first.name, "sh", "-c", script]);
    assert_eq!(out.exits(0).out(), "999:998\n0:0\n");
    let script = "cat /bin/file && stat -c %u:%g /bin/file && echo more >> /bin/file";
    assert_eq!(run(home, &["-v", &mount], script).out(), "kept\n999:998\n");
    let out = home.sm(&["exec", &first.name, "cat", "/bin/file"]);
    assert_eq!(out.exits(0).out(), "kept\nmore\n");
    let refused = home.sm(&["volume", "rm", &name]);
    assert!(refused.exits(1).err().contains("is in use by VM"));
    drop(first);
    home.sm(&["volume", "rm", &name]).exits(0);
}

#[test]
fn volumes_of_another_vm_are_mounted() {
    let home = Home::shared();
    let volume = volume(home);
    let data = format!("{}:/data:ro", volume.1);
    let first = idle(home, &["-v", &data, "--tmpfs", "/own"]);
    let script = "grep -c ' /data ext4 ro' /proc/mounts; grep -c ' /own ' /proc/mounts";
    let out = run(home, &["--volumes-from", &first.name], script).out();
    assert_eq!(out, "1\n0\n");
}

#[test]
fn bad_mounts_are_refused() {
    let home = Home::shared();
    for (options, why) in [
        (["-v", "/no/such/directory:/x"], "/no/such/directory"),
        (["-v", "x:relative"], "no option of this mount"),
        (["--tmpfs", "/t:size=much"], "no size"),
        (["--mount", "type=tmpfs"], "no target"),
    ] {
        let error = run(home, &options, "true").exits(125).err();
        assert!(error.contains(why), "{error}");
    }
    let twice = run(home, &["--tmpfs", "/t", "-v", "/t"], "true").exits(125);
    assert!(twice.err().contains("\"/t\""), "{}", twice.err());
    let file = run(home, &["--tmpfs", "/etc/passwd"], "true")
        .exits(125)
        .err();
    assert!(file.contains("cannot mount \"/etc/passwd\""), "{file}");
    let error = home.sm(&["volume", "inspect", "none"]).exits(1).err();
    assert!(error.contains("no such volume: \"none\""), "{error}");
}

/// A VM's process, and the lock of a volume, know the name that the VM was started with.
#[test]
fn refusals_name_vms_as_they_are_called_now() {
    let home = Home::shared();
    let (volume, image) = (unique("held"), image("busybox"));
    let mount = format!("{volume}:/v");
    let vm = home.detached(&["-m", "128m", "-v", &mount, &image, "sleep", "100000"]);
    let now = unique("renamed");
    home.sm(&["rename", &vm.name, &now]).exits(0);
    let holder = format!("VM \"{now}\"");
    let run = ["run", "--rm", "-m", "128m", "-v", &mount, &image, "true"];
    let clone = ["volume", "clone", &volume, "copy"];
    for (arguments, code) in [(&run[..], 125), (&clone, 1), (&["reset", &now], 1)] {
        let said = home.sm(arguments).exits(code).err();
        assert!(said.contains(&holder), "{arguments:?}: {said}");
        assert!(!said.contains(&vm.name), "{arguments:?}: {said}");
    }
    // A snapshot in use names the clone.
    let snapshot = unique("held");
    home.sm(&["snapshot", "create", &now, &snapshot]).exits(0);
    let clone = home.clone_of(&snapshot, "clone");
    let said = home.sm(&["snapshot", "rm", &snapshot]).exits(1).err();
    let holder = format!("VM \"{}\"", clone.name);
    assert!(said.contains(&holder), "{said}");
    drop(clone);
    home.sm(&["rename", &now, &vm.name]).exits(0);
    drop(vm);
    until("its clone is gone", || {
        home.sm(&["snapshot", "rm", &snapshot]).code == Some(0)
    });
}
