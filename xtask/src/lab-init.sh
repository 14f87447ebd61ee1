#!/bin/busybox sh
# PID 1 of the lab's initramfs: loads modules and makes the host's tree, with
# writes kept in memory, the root file system.
b=/bin/busybox

die() {
    echo "lab: $*"
    $b poweroff -f
}

$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs devtmpfs /dev
while read -r module options; do
    $b insmod "/modules/$module" $options || echo "lab: cannot load $module"
done </modules/list

# The host's files do not change under a running lab (build first, then test),
# so the guest may cache what it reads.
$b mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro root /lower ||
    die "cannot mount the host's tree"
$b mount -t tmpfs -o mode=755 upper /upper
$b mkdir /upper/files /upper/work
$b mount -t overlay -o lowerdir=/lower,upperdir=/upper/files,workdir=/upper/work root /new ||
    die "cannot mount the overlay"
for dir in proc sys dev tmp run; do
    $b mkdir -p /new/$dir
done
# The contents of the host's directories below the lab's own ones: see "visible" below.
for dir in tmp run dev; do
    $b mkdir -p /covered/$dir
    $b mount --bind /new/$dir /covered/$dir
done
for dir in proc sys dev; do
    $b mount --move /$dir /new/$dir
done
$b mkdir -p /new/dev/pts /new/dev/shm
$b mount -t devpts -o mode=620,ptmxmode=666 devpts /new/dev/pts
$b mount -t tmpfs -o mode=1777 shm /new/dev/shm
$b mount -t tmpfs -o mode=1777 tmp /new/tmp
$b mount -t tmpfs -o mode=755 run /new/run
# As Firecracker's guide to hosts has it: without, each VM waits for the kernel 10 ms (see "sm doctor").
$b mount -t cgroup2 -o favordynmods cgroup2 /new/sys/fs/cgroup

# Sockets and overlay uppers do not work on 9p: state of sm goes to a tmpfs.
$b mkdir -p /new/run/lab/control /new/run/lab/results /new/run/lab/data
$b mkdir -p -m 700 /new/run/user/0
for share in control results; do
    $b mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=none \
        $share /new/run/lab/$share || die "cannot mount the $share share"
done
# The workspace, its caches and the current directory, where these are below /tmp, /run
# or /dev (as in /dev/shm). Their writes stay in memory as all others do.
while IFS= read -r dir; do
    $b mkdir -p "/new$dir"
    $b mount --bind "/covered$dir" "/new$dir" || die "cannot show $dir"
done </new/run/lab/control/visible
$b cp $b /session /new/run/lab/
$b ifconfig lo 127.0.0.1 up
exec $b switch_root /new /run/lab/busybox sh /run/lab/session
