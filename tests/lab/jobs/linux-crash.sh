# A stock kernel appends synced records to ext4 on two virtio disks, of which one is raw and one a qcow2
# image, computes, and exchanges packets with the host, while live checkpoints are taken at random moments,
# by one protocol after the other. Each time the machine is killed and restored, stopped: QEMU's tools find
# the image whole, on copies of both disks the journal is replayed, the file system is clean, and every
# record is there that the guest had reported at the captured moment, and none that it wrote after. It then
# runs on: records, checksums and packets. LAB_CHECKPOINTS says how many.
# A job that does the same on another file system names the way that disks are captured there.
count=${LAB_CHECKPOINTS:-5}
method=${method:-copy-before-write}
truncate -s 64M raw.img
mkfs.ext4 -q -F raw.img
qemu-img convert -f raw -O qcow2 raw.img qcow2.img
# A tap that outlives the machine, as its user's own.
ip tuntap add dev lp-net0 mode tap
ip address add 192.0.2.1/24 dev lp-net0
ip link set lp-net0 up
trap 'end_vm; ip link delete lp-net0 || true; rm -rf "$work"' EXIT
second="<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='$work/qcow2.img'/>\
<target dev='vdb' bus='virtio'/></disk>"
linux_xml net.xml | sed -e "s|<source file='.*'/>|<source file='$work/raw.img'/>|" -e "s|</disk>|&$second|" \
    -e "s|dev='lp-net0'|& managed='no'|" -e "s|<memory unit='MiB'>512|<memory unit='MiB'>256|" > linux.xml

# Checks a copy of the disk of a format, and sets `whole` to the last record of its file.
check_copy() {
    rm -f copy.img log
    if [ "$1" = raw ]; then
        cp --sparse=always raw.img copy.img
    else
        qemu-img check -q -U -f "$1" "$1.img" || fail "the image is damaged"
        qemu-img convert -U -f "$1" -O raw "$1.img" copy.img
    fi
    check_ext4 copy.img "${2:-}"
    debugfs -R "dump /log log" copy.img 2> /dev/null
    whole=$("$LAB_DIR/journal" check log | grep -oE 'whole [0-9]+' | grep -oE '[0-9]+') || fail "$("$LAB_DIR/journal" check log)"
}

# Each disk was captured as it is to be, and a raw one that is restored where there is reflink shares blocks.
check_method() {
    local methods
    methods=$(grep -oE '"(reflink|copy-before-write)"' figures.json | tr -d '"' | tr '\n' ' ')
    [ "$methods" = "$method $method " ] || { cat figures.json; fail "the disks were captured in another way"; }
    if [ "$method" = reflink ]; then
        filefrag -v raw.img | grep shared > /dev/null || fail "the restored disk shares nothing with the image"
    fi
}

start_vm run linux.xml
wait_for 300 'lab: guest ready, 1 CPUs'
check_log boot
say 'ip link set eth0 up; ip address add 192.0.2.2/24 dev eth0; mkdir -p /mnt/raw /mnt/qcow2'
say 'mount -t ext4 /dev/vda /mnt/raw && mount -t ext4 /dev/vdb /mnt/qcow2 && echo is mounted'
wait_for 60 'is mounted'
say 'sums & journal write /mnt/raw/log raw & journal write /mnt/qcow2/log qcow2 & ping 192.0.2.1 | sed s/^.*seq=/seq:/ &'
wait_for 120 'sums: round 1 all right'
wait_for 120 'raw: 20$'
wait_for 120 'qcow2: 20$'
wait_for 120 'seq:2 '
for ((n = 0; n < count; n++)); do
    protocol=$(echo $protocols | cut -d ' ' -f $((n % $(echo $protocols | wc -w) + 1)))
    nap $((RANDOM % 3)).$((RANDOM % 10))
    crash_and_restore linux-net "$protocol" raw qcow2
    check_method
    check_copy raw replay
    on_raw=$whole
    check_copy qcow2 replay
    "$LIVEPOINT" resume linux-net
    say_figures "$n $protocol, by $method"
    check_moment raw "$on_raw"
    check_moment qcow2 "$whole"
    wait_for 120 'sums: round [0-9]+ all right'
    wait_for 120 '^(lab# )*seq:[0-9]+ '
    ! grep -aE 'WRONG|FAILED' console || fail "the guest found something wrong"
done
mark
say 'killall sums journal ping; sleep 1; umount /mnt/raw /mnt/qcow2 && echo is unmounted'
wait_for 60 'is unmounted'
check_log boot
say 'poweroff -f'
wait_vm 60 || fail "the process ended with status $?"
for format in raw qcow2; do
    last=$(reported $format)
    check_copy $format
    [ "$whole" -ge "$last" ] && [ "$whole" -le $((last + 1)) ] || fail "$last were reported, $whole are on the $format disk"
done
echo "all right"
