# Debian, installed by mmdebstrap into a raw image, boots from its virtio disk with its own kernel, initrd
# and systemd. While a SQLite database commits transactions and dpkg installs and removes a package, it is
# checkpointed live with every protocol, killed, and restored, stopped. On a copy of its disk the file
# system is clean after its journal's replay, and the database is whole, with every transaction that was
# reported at the captured moment and none that came after. Then it runs on: database, dpkg and every
# service are healthy, and it powers off to a clean file system.
# needs: prepare-root
cp --sparse=always "$LAB_DIR/root.img" disk.img
linux_xml disk.xml | sed -e "s|<kernel>.*</kernel>|<kernel>$LAB_DIR/root.vmlinuz</kernel>|" \
    -e "s|<initrd>.*</initrd>|<initrd>$LAB_DIR/root.initrd</initrd>|" \
    -e "s|<cmdline>.*</cmdline>|<cmdline>console=ttyS0 root=/dev/vda rw quiet systemd.show_status=0</cmdline>|" \
    -e "s|<source file='.*'/>|<source file='$work/disk.img'/>|" -e "s|<vcpu>1|<vcpu>2|" > linux.xml

# Replays the journals of a copy of the disk, checks it, and sets `whole` to its last transaction.
check_copy() {
    cp --sparse=always disk.img copy.img
    check_ext4 copy.img replay
    rm -f bank.db bank.db-journal
    debugfs -R "dump /var/lib/bank/bank.db bank.db" copy.img 2> /dev/null
    # Of a transaction under way, which SQLite takes back.
    debugfs -R "dump /var/lib/bank/bank.db-journal bank.db-journal" copy.img 2> /dev/null
    [ -s bank.db-journal ] || rm -f bank.db-journal
    whole=$(python3 - <<'PY'
import sqlite3
bank = sqlite3.connect("bank.db")
assert bank.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
assert bank.execute("SELECT sum(money) FROM account").fetchone() == (100000,)
count, last = bank.execute("SELECT count(*), max(n) FROM moved").fetchone()
assert count == last, (count, last)
print(last)
PY
    ) || fail "the database on the disk"
    rm copy.img
}

start=$SECONDS
start_vm run linux.xml
wait_for 900 'lab: guest ready, 2 CPUs, systemd, /dev/vda ext4'
echo "ready after $((SECONDS - start)) s"
check_log boot
say 'bank run &'
say 'n=0; while [ ! -e /run/enough ]; do dpkg -i lab-package.deb && dpkg -r lab-package && n=$((n + 1)) && echo "dpkg: $n" >&3; done 3>&1 > /run/dpkg.log 2>&1 &'
wait_for 300 'bank: 10$'
wait_for 300 'dpkg: 1$'
for protocol in $protocols; do
    start=$SECONDS
    nap $((RANDOM % 3)).$((RANDOM % 10))
    crash_and_restore linux-disk "$protocol" bank
    check_copy
    "$LIVEPOINT" resume linux-disk
    say_figures "$protocol"
    check_moment bank "$whole"
    wait_for 300 '^(lab# )*dpkg: [0-9]+$'
    echo "  healthy after $((SECONDS - start)) s"
done
mark
# dpkg ends when it has removed its package, and the bank in the middle of something.
say 'touch /run/enough; kill %1; wait; bank check; dpkg --configure -a && echo "audit:$(dpkg --audit)."'
wait_for 300 '^(lab# )*bank: (whole|WRONG)'
lines '^(lab# )*bank: whole [0-9]+$' || fail "the database"
wait_for 120 '^(lab# )*audit:'
lines '^(lab# )*audit:\.$' || fail "dpkg"
mark
say 'echo "system:$(systemctl is-system-running --wait)"; systemctl --failed --no-legend --plain | sed s/^/failed:/; echo all listed'
wait_for 300 '^(lab# )*all listed'
! lines 'failed:' || fail "a service is not healthy"
lines '^(lab# )*system:running$' || fail "the system is not healthy"
check_log
say 'systemctl poweroff'
wait_vm 180 || fail "the process ended with status $?"
check_ext4 disk.img
echo "all right"
