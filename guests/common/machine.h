/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/* Between the files of the runtime. Guests use runtime.h. */
#ifndef MACHINE_H
#define MACHINE_H

#include "runtime.h"

/* entry.S and traps.S */
extern uint64_t boot_params_gpa, pvh_start_info_gpa;
extern uint64_t start_cr3, start_kernel_stack, start_user_stack, start_rip;
extern uint64_t start_tss_selector;
extern uint64_t gdt[GDT_ENTRIES];
extern const char trampoline[], trampoline_end[];
extern const char exception_stubs[], irq_stubs[];
extern volatile uint32_t irqs_pending;

/* The first byte after the image. From link.ld. */
extern char image_end[];

/* The idt of entry.S: two words a gate. */
extern uint64_t idt[256][2];

/* boot.c: RAM as the boot protocol described it, and the command line. */
struct boot_info {
	struct ram_range ram[MAX_RAM_RANGES];
	unsigned ram_ranges;
	char cmdline[2048];
};
extern struct boot_info boot_info;
void boot_info_read(void);

/* memory.c */
void memory_init(void);

/* cpu.c */
void cpu_init(void);

/* apic.c */
#define LAPIC_SPURIOUS 0xf0
#define LAPIC_ENABLED 0x100

/* serial.c */
void serial_init(void);

#define LAPIC_BASE 0xfee00000ull
#define IOAPIC_BASE 0xfec00000ull
#define PCI_WINDOW 0xc0000000ull

#endif
