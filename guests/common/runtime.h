/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * What a guest may use. All of it runs at CPL3, on bare hardware: no operating
 * system is below. The parts under "portable" also build on a host, where
 * guests/native/ stands in for the rest.
 */
#ifndef RUNTIME_H
#define RUNTIME_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "layout.h"

#define KIB 1024ul
#define MIB (1024 * KIB)
#define GIB (1024 * MIB)
#define PAGE_BYTES 4096ul
#define LARGE_PAGE_BYTES (2 * MIB)

/* ---- portable ------------------------------------------------------------ */

/* The guest itself. Returning powers the machine off. */
void guest_main(void);

/* Prints a formatted line, see format.c for what the format knows. Lines of
   two CPUs do not mix. At most 511 bytes. */
void print(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* As print(), then powers off. For a command line that makes no sense. */
_Noreturn void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Formats like snprintf, and returns the length without the final NUL. */
size_t format_text(char *out, size_t size, const char *format, va_list args);
size_t format_line(char *out, size_t size, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* Options are `key=value` words of the kernel command line. */
void args_parse(const char *cmdline);
const char *arg_text(const char *key, const char *fallback);
/* A number, with an optional suffix K, M, G or T (powers of 1024). */
uint64_t arg_number(const char *key, uint64_t fallback);

/* Memory that is never given back, zeroed by nobody: RAM is zero when a
   machine starts. Fails the guest where RAM is too small. */
void *arena_alloc(uint64_t bytes, uint64_t align);

/* 0 where the rate is not known. */
uint64_t tsc_khz(void);

struct cpu_features {
	bool avx2_fma; /* usable: the state is enabled too */
	bool avx512f;
};
const struct cpu_features *cpu_features(void);

static inline uint64_t rdtsc(void)
{
	uint32_t low, high;

	__asm__ volatile("rdtsc" : "=a"(low), "=d"(high)::"memory");
	return (uint64_t)high << 32 | low;
}

static inline void cpuid(uint32_t leaf, uint32_t subleaf, uint32_t regs[4])
{
	__asm__ volatile("cpuid"
			 : "=a"(regs[0]), "=b"(regs[1]), "=c"(regs[2]), "=d"(regs[3])
			 : "a"(leaf), "c"(subleaf));
}

static inline void cpu_relax(void)
{
	__asm__ volatile("pause" ::: "memory");
}

bool text_equal(const char *a, const char *b);
size_t text_length(const char *text);
void *memcpy(void *to, const void *from, size_t bytes);
void *memset(void *to, int value, size_t bytes);

/* ---- the machine --------------------------------------------------------- */

struct ram_range {
	uint64_t start, end;
};

/* RAM above 2 MiB that nothing uses yet, lowest first. */
#define MAX_RAM_RANGES 16
extern struct ram_range arena[MAX_RAM_RANGES];
extern unsigned arena_ranges;

/* All RAM of the memory map. */
uint64_t ram_bytes(void);

/* 2 MiB or 4 KiB: how RAM is mapped (option `pages=`). */
uint64_t mapping_bytes(void);

static inline void out8(uint16_t port, uint8_t value)
{
	__asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port) : "memory");
}

static inline void out16(uint16_t port, uint16_t value)
{
	__asm__ volatile("outw %0, %1" ::"a"(value), "Nd"(port) : "memory");
}

static inline void out32(uint16_t port, uint32_t value)
{
	__asm__ volatile("outl %0, %1" ::"a"(value), "Nd"(port) : "memory");
}

static inline uint8_t in8(uint16_t port)
{
	uint8_t value;

	__asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port) : "memory");
	return value;
}

static inline uint16_t in16(uint16_t port)
{
	uint16_t value;

	__asm__ volatile("inw %1, %0" : "=a"(value) : "Nd"(port) : "memory");
	return value;
}

static inline uint32_t in32(uint16_t port)
{
	uint32_t value;

	__asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port) : "memory");
	return value;
}

/* Asks the CPL0 stub for one of the SERVICE_* of layout.h. */
uint64_t kernel_call(unsigned service, uint64_t a, uint64_t b);

static inline uint64_t read_msr(uint32_t index)
{
	return kernel_call(SERVICE_READ_MSR, index, 0);
}

static inline void write_msr(uint32_t index, uint64_t value)
{
	kernel_call(SERVICE_WRITE_MSR, index, value);
}

void serial_write(const char *text, size_t bytes);

struct lock {
	volatile uint32_t held;
};
void lock_acquire(struct lock *lock);
void lock_release(struct lock *lock);

/* Powers off by ACPI, else resets by the i8042, else by a triple fault. */
_Noreturn void power_off(void);
_Noreturn void reset(void);
_Noreturn void triple_fault(void);

/* Interrupts, for a guest that waits. They are taken in wait_for_irq() only,
   and each must be ended by end_of_irq() once its device is served. */
void irq_init(void);
void irq_enable(unsigned irq, bool level_triggered);
uint32_t wait_for_irq(void); /* returns a bit for each IRQ that came */
void end_of_irq(void);

/* Local APIC registers by their xAPIC offset, in either mode. */
uint32_t lapic_read(uint32_t offset);
void lapic_write(uint32_t offset, uint32_t value);
bool lapic_is_x2apic(void);

/* Starts CPUs 1..count-1, each in run(cpu) at CPL3. Fails the guest if one
   does not come. APIC ids are taken to be 0..count-1. */
void smp_start(unsigned count, void (*run)(unsigned cpu));

#endif
