# The same as linux-crash on XFS, which freezes the disks by reflink, and where a restored raw disk shares
# its blocks with the image. The short form has two checkpoints.
work_on /mnt/xfs
method=reflink
if [ "${LAB_CHECKPOINTS:-5}" -le 5 ]; then
    LAB_CHECKPOINTS=2
    protocols="threaded cow"
fi
. "$LAB/jobs/linux-crash.sh"
