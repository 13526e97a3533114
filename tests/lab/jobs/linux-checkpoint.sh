# A stock kernel that computes checksums in tmpfs, and in AVX registers pinned to each of 4 vCPUs, is
# checkpointed live with every protocol, killed, and restored: all verifies, again and again, and the
# kernel's log has nothing of hangs or clocks. Its date goes on, or catches up, as asked.
linux_xml smp.xml > linux.xml
start_vm run linux.xml
wait_for 300 'lab: guest ready, 4 CPUs'
check_log boot
mark
say 'sums & avxloop 100000 &'
wait_for 120 'sums: round 2 all right'
wait_for 120 'avx: (cpu 3 round|this CPU has no AVX2)'
cpus="0 1 2 3"
! lines 'no AVX2' || { cpus=; echo "no AVX here: QEMU before 8 does not let KVM see XSETBV"; }
for protocol in $protocols; do
    rm -f image.lpi
    checkpoint linux-smp --protocol "$protocol" --out image.lpi --json > figures.json
    kill_vm
    say_figures "$protocol"
    before=$(grep -aoE 'sums: round [0-9]+' console | tail -n 1 | grep -oE '[0-9]+')
    mark
    start_vm restore image.lpi
    wait_for 120 "sums: round $((before + 2)) all right"
    for cpu in $cpus; do wait_for 120 "avx: cpu $cpu round"; done
    if grep -qaE 'WRONG' console; then grep -aE WRONG console; fail "a checksum"; fi
done
mark
say 'killall sums avxloop; sleep 1; echo all quiet'
wait_for 60 '^(lab# )*all quiet'
check_log

# 20 seconds between a checkpoint and its restore.
guest_date() {
    mark
    say 'echo date $(date +%s)'
    wait_for 30 'date [0-9]{9,}'
    lines 'date [0-9]' | grep -oE '[0-9]{9,}' | tail -n 1
}
rm -f image.lpi
ahead=$(($(guest_date) - $(date +%s)))
# The moment of this one is soon after its start.
saved=$(date +%s)
checkpoint linux-smp --protocol cow --out image.lpi --json > /dev/null
kill_vm
sleep 20
start_vm restore image.lpi --clock realtime
sleep 1
late=$(($(guest_date) - $(date +%s) - ahead))
[ ${late#-} -le 1 ] || fail "with realtime the guest's clock is off by $late s"
check_log
kill_vm
start_vm restore image.lpi
sleep 1
behind=$(($(date +%s) - $(guest_date) + ahead))
gone=$(($(date +%s) - saved))
[ $behind -ge 20 ] && [ $behind -le $((gone + 1)) ] || fail "the guest's clock is $behind s behind; $gone s are gone"
# Before the log is checked, which empties it.
mark
say 'dmesg | grep -c "crng reseeded due to virtual machine fork"; echo counted'
wait_for 30 '^(lab# )*counted'
lines '^(lab# )*[1-9][0-9]*$' > /dev/null || fail "no new generation id was noticed"
check_log
say 'poweroff -f'
wait_vm 60 || fail "the process ended with status $?"
echo "all right"
