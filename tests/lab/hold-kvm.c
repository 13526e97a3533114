// Keeps a virtual machine for as long as L1 runs, so that L1's kernel never switches on or off, in its own
// code, what only a first or a last machine needs. See "What the emulator does wrong" in README.md.
// Goes to the background when the machine is there.

#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <unistd.h>

static int must(int result, const char *what) {
    if (result < 0) {
        perror(what);
        _exit(1);
    }
    return result;
}

int main(void) {
    int kvm = must(open("/dev/kvm", O_RDWR), "/dev/kvm");
    int vm = must(ioctl(kvm, KVM_CREATE_VM, 0UL), "KVM_CREATE_VM");
    // A virtual CPU's interrupt controller is disabled until its guest enables it: this one's stays so.
    must(ioctl(vm, KVM_CREATE_IRQCHIP, 0UL), "KVM_CREATE_IRQCHIP");
    must(ioctl(vm, KVM_CREATE_VCPU, 0UL), "KVM_CREATE_VCPU");
    must(daemon(0, 0), "daemon");
    for (;;) pause();
}
