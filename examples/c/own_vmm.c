/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * A complete small virtual machine monitor that is not livepoint's, with live checkpoints by
 * liblivepoint: its own KVM ioctls, its own vCPU thread, its own serial port.
 *
 *     own_vmm KERNEL.elf CMDLINE IMAGE PROTOCOL [check]
 *         boots a 64-bit ELF kernel (the Linux boot protocol), takes a live checkpoint of it into
 *         IMAGE after 0.3 s, and runs on. With `check`, memory is copied in the pause and compared
 *         with the image: every page must be of that one moment.
 *     own_vmm --restore IMAGE
 *         goes on where the checkpoint was taken; the process that took it may be dead.
 *
 * What it takes to make a VMM of one's own checkpointable is marked with "livepoint:".
 */
#define _GNU_SOURCE
#include <livepoint.h>

#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum {
    MEMORY_BYTES = 128 << 20,
    BOOT_PARAMS = 0x7000,
    PAGE_TABLES = 0x10000, /* six pages */
    CMDLINE = 0x20000,
    COM1 = 0x3f8,
    POWER = 0x604,
};

/* The serial port, as far as a guest that only prints needs one. */
struct serial {
    uint8_t registers[8];
    uint64_t bytes_sent;
};

static int kvm_fd, vm_fd, vcpu_fd;
static struct kvm_run *run;
static uint8_t *memory;
static struct serial serial;
static lvp_guest *guest;
static uint8_t *frozen; /* memory as it was in the pause; NULL without `check` */
static atomic_int has_ended;

static void die(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    _exit(1);
}

static int checked_ioctl(int fd, unsigned long request, void *argument, const char *name)
{
    int result = ioctl(fd, request, argument);
    if (result < 0)
        die("%s: %s", name, strerror(errno));
    return result;
}
#define IOCTL(fd, request, argument) checked_ioctl(fd, request, argument, #request)

static void expect_ok(lvp_status status, const char *what)
{
    if (status != LVP_OK)
        die("%s: %s", what, lvp_error_message());
}

/* ---- A VM: memory, interrupt controllers, timer, one vCPU -------------------------------- */

static void make_vm(void)
{
    kvm_fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (kvm_fd < 0)
        die("/dev/kvm: %s", strerror(errno));
    vm_fd = IOCTL(kvm_fd, KVM_CREATE_VM, 0);
    /* Huge pages where the kernel has them: a checkpoint of them costs the guest less. */
    memory = mmap(NULL, MEMORY_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        die("mmap: %s", strerror(errno));
    madvise(memory, MEMORY_BYTES, MADV_HUGEPAGE);
    struct kvm_userspace_memory_region slot = {
        .slot = 0,
        .memory_size = MEMORY_BYTES,
        .userspace_addr = (uint64_t)(uintptr_t)memory,
    };
    IOCTL(vm_fd, KVM_SET_USER_MEMORY_REGION, &slot);
    IOCTL(vm_fd, KVM_SET_TSS_ADDR, (void *)0xfffbd000);
    IOCTL(vm_fd, KVM_CREATE_IRQCHIP, 0); /* before the vCPU */
    struct kvm_pit_config pit = {.flags = KVM_PIT_SPEAKER_DUMMY};
    IOCTL(vm_fd, KVM_CREATE_PIT2, &pit);
    vcpu_fd = IOCTL(vm_fd, KVM_CREATE_VCPU, 0);
    size_t run_bytes = (size_t)IOCTL(kvm_fd, KVM_GET_VCPU_MMAP_SIZE, 0);
    run = mmap(NULL, run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu_fd, 0);
    if (run == MAP_FAILED)
        die("mmap of a vCPU: %s", strerror(errno));
}

/* ---- A new guest: kernel, boot parameters, first registers ------------------------------- */

static uint64_t load_kernel(const char *path)
{
    FILE *file = fopen(path, "rb");
    Elf64_Ehdr header;
    if (!file || fread(&header, sizeof header, 1, file) != 1 ||
        memcmp(header.e_ident, ELFMAG "\2", 5) != 0)
        die("%s is not a 64-bit ELF file", path);
    for (unsigned i = 0; i < header.e_phnum; i++) {
        Elf64_Phdr segment;
        long at = (long)(header.e_phoff + i * sizeof segment);
        if (fseek(file, at, SEEK_SET) != 0 || fread(&segment, sizeof segment, 1, file) != 1)
            die("%s is cut off", path);
        if (segment.p_type != PT_LOAD || segment.p_filesz == 0)
            continue;
        if (segment.p_paddr > MEMORY_BYTES || segment.p_memsz > MEMORY_BYTES - segment.p_paddr ||
            segment.p_filesz > segment.p_memsz)
            die("%s does not fit the memory", path);
        if (fseek(file, (long)segment.p_offset, SEEK_SET) != 0 ||
            fread(memory + segment.p_paddr, segment.p_filesz, 1, file) != 1)
            die("%s is cut off", path);
    }
    fclose(file);
    return header.e_entry;
}

static void put64(uint64_t gpa, uint64_t value)
{
    memcpy(memory + gpa, &value, sizeof value);
}

static void write_boot_params(const char *cmdline)
{
    /* e820: conventional memory, and all above 1 MiB. */
    struct __attribute__((packed)) {
        uint64_t start, bytes;
        uint32_t type;
    } e820[] = {{0, 0x9fc00, 1}, {1 << 20, MEMORY_BYTES - (1 << 20), 1}};
    uint32_t pointer = CMDLINE;
    memory[BOOT_PARAMS + 0x1e8] = sizeof e820 / sizeof e820[0];
    memcpy(memory + BOOT_PARAMS + 0x2d0, e820, sizeof e820);
    memcpy(memory + BOOT_PARAMS + 0x228, &pointer, sizeof pointer);
    snprintf((char *)memory + CMDLINE, 4096, "%s", cmdline);
    /* The first 4 GiB mapped to themselves: present, writable, accessed; dirty and 2 MiB. */
    put64(PAGE_TABLES, (PAGE_TABLES + 0x1000) | 0x23);
    for (uint64_t gib = 0; gib < 4; gib++) {
        uint64_t directory = PAGE_TABLES + 0x1000 * (gib + 2);
        put64(PAGE_TABLES + 0x1000 + 8 * gib, directory | 0x23);
        for (uint64_t page = 0; page < 512; page++)
            put64(directory + 8 * page, gib << 30 | page << 21 | 0xe3);
    }
}

static void set_cpuid(void)
{
    enum { ENTRIES = 256 };
    struct kvm_cpuid2 *cpuid = calloc(1, sizeof *cpuid + ENTRIES * sizeof cpuid->entries[0]);
    cpuid->nent = ENTRIES;
    IOCTL(kvm_fd, KVM_GET_SUPPORTED_CPUID, cpuid);
    for (unsigned i = 0; i < cpuid->nent; i++) {
        /* livepoint: a guest that may run guests of its own cannot be saved. */
        if (cpuid->entries[i].function == 1)
            cpuid->entries[i].ecx &= ~(1u << 5); /* VMX */
        if (cpuid->entries[i].function == 0x80000001)
            cpuid->entries[i].ecx &= ~(1u << 2); /* SVM */
    }
    IOCTL(vcpu_fd, KVM_SET_CPUID2, cpuid);
    free(cpuid);
}

static void set_entry(uint64_t entry)
{
    struct kvm_sregs sregs;
    IOCTL(vcpu_fd, KVM_GET_SREGS, &sregs);
    struct kvm_segment code = {
        .limit = UINT32_MAX, .selector = 0x10, .type = 11, .present = 1, .s = 1, .l = 1, .g = 1};
    struct kvm_segment data = {
        .limit = UINT32_MAX, .selector = 0x18, .type = 3, .present = 1, .s = 1, .db = 1, .g = 1};
    sregs.cs = code;
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
    sregs.cr0 = 0x80000031;
    sregs.cr3 = PAGE_TABLES;
    sregs.cr4 = 0x20;
    sregs.efer = 0x500;
    IOCTL(vcpu_fd, KVM_SET_SREGS, &sregs);
    struct kvm_regs regs = {.rip = entry, .rsi = BOOT_PARAMS, .rsp = PAGE_TABLES, .rflags = 2};
    IOCTL(vcpu_fd, KVM_SET_REGS, &regs);
}

/* ---- Devices, and the vCPU's loop --------------------------------------------------------- */

/* Returns whether the guest goes on. */
static int handle_port(void)
{
    uint8_t *data = (uint8_t *)run + run->io.data_offset;
    unsigned port = run->io.port, bytes = run->io.size * run->io.count;
    if (run->io.direction == KVM_EXIT_IO_IN) {
        memset(data, 0xff, bytes);
        if (port >= COM1 && port < COM1 + 8)
            /* Line status: there is always room to send, and never anything to read. */
            memset(data, port == COM1 + 5 ? 0x60 : serial.registers[port - COM1], bytes);
        return 1;
    }
    if (port == COM1 && (serial.registers[3] & 0x80) == 0) {
        serial.bytes_sent += bytes;
        fwrite(data, 1, bytes, stdout);
        fflush(stdout);
    } else if (port >= COM1 && port < COM1 + 8) {
        serial.registers[port - COM1] = data[0];
    }
    return port != POWER;
}

static int handle_exit(void)
{
    switch (run->exit_reason) {
    case KVM_EXIT_IO:
        return handle_port();
    case KVM_EXIT_INTR:
        return 1;
    default:
        die("the guest ended with KVM exit %u", run->exit_reason);
        return 0;
    }
}

static void *vcpu_thread(void *unused)
{
    /* livepoint: from here on a pause waits for this thread to come to its gate. */
    expect_ok(lvp_guest_vcpu_enter(guest, 0, vcpu_fd), "lvp_guest_vcpu_enter");
    for (int runs = 1; runs;) {
        lvp_gate next = lvp_guest_vcpu_gate(guest, 0);
        if (next < 0)
            die("lvp_guest_vcpu_gate: %s", lvp_error_message());
        if (next == LVP_GATE_ENTER && ioctl(vcpu_fd, KVM_RUN, 0) < 0) {
            if (errno == EINTR || errno == EAGAIN)
                continue;
            die("KVM_RUN: %s", strerror(errno));
        }
        runs = handle_exit();
    }
    has_ended = 1;
    while (lvp_guest_vcpu_leave(guest, 0) == LVP_GATE_HANDLE_EXIT)
        handle_exit();
    return unused;
}

/* ---- livepoint: what the engine asks of this VMM ----------------------------------------- */

/* A guest that has powered off has nothing to go on from: this fails the checkpoint. */
static lvp_status begin_pause(void *unused)
{
    (void)unused;
    return has_ended ? 1 : LVP_OK;
}

static lvp_status save_state(void *unused, lvp_state *state)
{
    (void)unused;
    lvp_status status = lvp_kvm_state_save(state, vm_fd, &vcpu_fd, 1);
    if (status != LVP_OK)
        return status;
    if (frozen)
        memcpy(frozen, memory, MEMORY_BYTES);
    return lvp_state_add(state, "own-serial", 0, 1, &serial, sizeof serial);
}

static void register_guest(void)
{
    lvp_guest_options options = {
        .struct_size = sizeof options,
        .vm_fd = vm_fd,
        .kvm_fd = kvm_fd,
        .vcpu_count = 1,
        .name = "own-vmm",
        .description = "own_vmm: 128 MiB, 1 vCPU, serial port",
    };
    lvp_guest_callbacks callbacks = {
        .struct_size = sizeof callbacks, .pause = begin_pause, .save_state = save_state};
    expect_ok(lvp_guest_new(&options, &callbacks, &guest), "lvp_guest_new");
    lvp_guest_region region = {
        .struct_size = sizeof region, .hva = memory, .bytes = MEMORY_BYTES, .slot = 0};
    expect_ok(lvp_guest_add_region(guest, &region), "lvp_guest_add_region");
}

static void restore(const char *path)
{
    lvp_image *image;
    lvp_state *state;
    lvp_section section = {.struct_size = sizeof section};
    lvp_fill_options fresh = {.struct_size = sizeof fresh, .memory_is_fresh = 1};
    expect_ok(lvp_image_open(path, &image), path);
    expect_ok(lvp_guest_fill(guest, image, &fresh), "lvp_guest_fill");
    expect_ok(lvp_image_state(image, &state), "lvp_image_state");
    expect_ok(lvp_kvm_state_restore(state, vm_fd, &vcpu_fd, 1, LVP_CLOCK_CONTINUE),
              "lvp_kvm_state_restore");
    expect_ok(lvp_state_find(state, "own-serial", 0, &section), "the serial port's state");
    if (section.version != 1 || section.bytes != sizeof serial)
        die("the serial port's state is of another version");
    memcpy(&serial, section.data, sizeof serial);
    fprintf(stderr, "own_vmm: restored, %llu bytes were sent before\n",
            (unsigned long long)serial.bytes_sent);
    lvp_state_free(state);
    lvp_image_free(image);
}

static void compare_with_image(const char *path)
{
    lvp_image *image;
    uint8_t *saved = malloc(MEMORY_BYTES);
    expect_ok(lvp_image_open(path, &image), path);
    expect_ok(lvp_image_read(image, 0, saved, MEMORY_BYTES), "lvp_image_read");
    size_t wrong = 0;
    for (size_t page = 0; page < MEMORY_BYTES; page += 4096)
        wrong += memcmp(saved + page, frozen + page, 4096) != 0;
    fprintf(stderr, "own_vmm: %zu of %d pages differ from the moment\n", wrong,
            MEMORY_BYTES / 4096);
    if (wrong)
        die("the image is not the memory of one moment");
    lvp_image_free(image);
    free(saved);
}

static lvp_protocol protocol_by_name(const char *name)
{
    static const char *const names[] = {"default", "stop", "threaded", "cow", "precopy", "auto"};
    for (unsigned i = 0; i < sizeof names / sizeof names[0]; i++)
        if (strcmp(name, names[i]) == 0)
            return i;
    die("there is no protocol %s", name);
    return 0;
}

static void checkpoint(const char *path, const char *protocol)
{
    lvp_checkpoint_options options = {
        .struct_size = sizeof options,
        .protocol = protocol_by_name(protocol),
        .pause_limit_ms = 30000, /* a busy host is no reason to give up */
    };
    lvp_statistics cost = {.struct_size = sizeof cost};
    lvp_job *job;
    expect_ok(lvp_guest_checkpoint(guest, path, &options, &job), "lvp_guest_checkpoint");
    if (lvp_job_wait(job, -1) != LVP_OK)
        die("the checkpoint failed: %s", lvp_job_error(job));
    expect_ok(lvp_job_statistics(job, &cost), "lvp_job_statistics");
    fprintf(stderr, "own_vmm: checkpoint by %s: the guest stood still for %llu us of %llu\n",
            protocol, (unsigned long long)cost.downtime_us, (unsigned long long)cost.total_us);
    lvp_job_free(job);
    if (frozen)
        compare_with_image(path);
}

int main(int argc, char **argv)
{
    int restores = argc == 3 && strcmp(argv[1], "--restore") == 0;
    if (!restores && argc != 5 && argc != 6)
        die("usage: own_vmm KERNEL.elf CMDLINE IMAGE PROTOCOL [check] | own_vmm --restore IMAGE");
    make_vm();
    register_guest();
    if (restores) {
        restore(argv[2]);
    } else {
        uint64_t entry = load_kernel(argv[1]);
        write_boot_params(argv[2]);
        set_cpuid();
        set_entry(entry);
        if (argc == 6) {
            frozen = malloc(MEMORY_BYTES);
            memset(frozen, 1, MEMORY_BYTES); /* not in the pause */
        }
    }
    pthread_t thread;
    if (pthread_create(&thread, NULL, vcpu_thread, NULL) != 0)
        die("pthread_create failed");
    if (!restores) {
        nanosleep(&(struct timespec){.tv_nsec = 300000000}, NULL);
        checkpoint(argv[3], argv[4]);
    }
    pthread_join(thread, NULL);
    lvp_guest_free(guest);
    fprintf(stderr, "own_vmm: the guest powered off\n");
    return 0;
}
