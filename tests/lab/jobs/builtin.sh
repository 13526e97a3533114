# Livepoint's own guests under ordinary KVM and an older kernel (6.1): a computation of the NAS
# Parallel Benchmarks goes on through live checkpoints of every protocol and verifies; the images are
# whole. They are not restored here: these guests do their I/O at CPL3 by the TSS's permission bitmap,
# which QEMU's emulation (10.0) refuses where the TSS is marked busy, as it is in a restored vCPU.
cat > npb.xml <<XML
<domain type='kvm'>
  <name>lab-npb</name>
  <memory unit='MiB'>192</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64'>hvm</type>
    <kernel>builtin:npb</kernel>
    <cmdline>kernel=is class=S repeat=100000</cmdline>
  </os>
  <devices><serial type='stdio'><target port='0'/></serial><memballoon model='none'/></devices>
</domain>
XML
start_vm run npb.xml
wait_for 120 'Verification = SUCCESSFUL'
for protocol in $protocols; do
    rm -f image.lpi
    checkpoint lab-npb --protocol "$protocol" --out image.lpi --json > figures.json
    say_figures "$protocol"
    "$LIVEPOINT" verify image.lpi > /dev/null || fail "verify"
    mark
    wait_for 120 'Verification = SUCCESSFUL'
done
! lines 'UNSUCCESSFUL|CORRUPT|PANIC' || fail "a result is wrong"
seen=0
! lines 'UNSUCCESSFUL|CORRUPT|PANIC' || fail "a result is wrong"
echo "all right"
