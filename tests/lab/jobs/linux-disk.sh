# A stock kernel finds its virtio disk by the distribution's own modules. Records that it appends to a
# file on ext4, and reports once they are synced, are all there after a clean power-off, and after the
# machine is killed in the middle: the journal is replayed on a copy, and the file system is clean.
truncate -s 64M disk.img
mkfs.ext4 -q -F disk.img
linux_xml disk.xml | sed "s|<source file='.*'/>|<source file='$work/disk.img'/>|" > linux.xml

# Checks the file system of an image, and that its journal file has all records up to the last
# reported one, and at most one more. `replay` first does what a mount would.
check_disk() {
    local last whole
    check_ext4 "$@"
    rm -f log
    debugfs -R "dump /log log" "$1" 2> /dev/null
    last=$(reported journal)
    whole=$("$LAB_DIR/journal" check log | grep -oE 'whole [0-9]+' | grep -oE '[0-9]+') || fail "$("$LAB_DIR/journal" check log)"
    echo "reported $last, on the disk $whole"
    [ "$whole" -ge "$last" ] && [ "$whole" -le $((last + 1)) ] || fail "$last were reported, $whole are on the disk"
}

start_vm run linux.xml
wait_for 300 'lab: guest ready, 1 CPUs'
check_log boot
say 'echo disk $(cat /sys/block/vda/size) $(cat /sys/block/vda/serial) $(readlink /sys/block/vda/device/driver | sed s,.*/,,)'
wait_for 60 'disk 131072 lab-disk virtio_blk'
say 'mount -t ext4 /dev/vda /mnt && journal write /mnt/log &'
wait_for 120 'journal: 10$'
say 'killall journal; sleep 1; umount /mnt && echo is unmounted'
wait_for 60 'is unmounted'
check_disk disk.img
mark
say 'mount -t ext4 /dev/vda /mnt && rm /mnt/log && journal write /mnt/log &'
wait_for 120 'journal: 20$'
kill_vm
cp disk.img copy.img
check_disk copy.img replay
rm -f console; seen=0
start_vm run linux.xml
wait_for 300 'lab: guest ready, 1 CPUs'
say 'mount -t ext4 /dev/vda /mnt && journal check /mnt/log; umount /mnt; poweroff -f'
wait_for 60 'journal: whole [0-9]+'
wait_vm 60 || fail "the process ended with status $?"
check_ext4 disk.img
echo "all right"
