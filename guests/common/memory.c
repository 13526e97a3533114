/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * Page tables for all RAM, and the memory behind the image.
 *
 * The tables are written here, at CPL3, while those of entry.S are in use;
 * only the switch needs CPL0. They identity map RAM and the two APICs, user
 * accessible, with accessed and dirty bits set: then the CPU never writes to
 * them, and a checkpoint never sees them dirty.
 */
#include "machine.h"

#define PTE_TABLE 0x27  /* present, writable, user, accessed */
#define PTE_PAGE 0x67   /* and dirty */
#define PTE_LARGE 0xe7  /* and 2 MiB */
#define PTE_DEVICE 0xff /* and uncached */

/* The first tables map this much; the new ones must be built inside. */
#define FIRST_TABLES_END GIB

struct ram_range arena[MAX_RAM_RANGES];
unsigned arena_ranges;

static uint64_t mapping = LARGE_PAGE_BYTES;
static uint64_t next_table, tables_limit;
static uint64_t *root;

static uint64_t *new_table(void)
{
	uint64_t *table = (uint64_t *)next_table;

	if (next_table + PAGE_BYTES > tables_limit)
		fail("runtime: no room for page tables");
	next_table += PAGE_BYTES;
	memset(table, 0, PAGE_BYTES);
	return table;
}

static uint64_t *next_level(uint64_t *entry)
{
	if (*entry == 0)
		*entry = (uint64_t)new_table() | PTE_TABLE;
	return (uint64_t *)(*entry & -PAGE_BYTES);
}

static uint64_t *directory_entry(uint64_t address)
{
	uint64_t *table = next_level(&root[address >> 39 & 511]);

	table = next_level(&table[address >> 30 & 511]);
	return &table[address >> 21 & 511];
}

/* Maps whole 2 MiB, though the range may end within: nothing goes there. */
static void map_ram(uint64_t start, uint64_t end)
{
	start &= -LARGE_PAGE_BYTES;
	for (uint64_t at = start; at < end; at += LARGE_PAGE_BYTES) {
		uint64_t *entry = directory_entry(at);
		uint64_t *table;

		if (*entry != 0)
			continue;
		if (mapping == LARGE_PAGE_BYTES) {
			*entry = at | PTE_LARGE;
			continue;
		}
		table = next_level(entry);
		for (unsigned i = 0; i < 512; i++)
			table[i] = (at + i * PAGE_BYTES) | PTE_PAGE;
	}
}

uint64_t mapping_bytes(void)
{
	return mapping;
}

uint64_t ram_bytes(void)
{
	uint64_t bytes = 0;

	for (unsigned i = 0; i < boot_info.ram_ranges; i++)
		bytes += boot_info.ram[i].end - boot_info.ram[i].start;
	return bytes;
}

static void map_everything(void)
{
	root = new_table();
	map_ram(0, (uint64_t)image_end);
	for (unsigned i = 0; i < boot_info.ram_ranges; i++)
		map_ram(boot_info.ram[i].start, boot_info.ram[i].end);
	*directory_entry(IOAPIC_BASE) = IOAPIC_BASE | PTE_DEVICE;
	*directory_entry(LAPIC_BASE) = LAPIC_BASE | PTE_DEVICE;
	/* Where livepoint puts the BARs; other machines may have RAM there. */
	if (*directory_entry(PCI_WINDOW) == 0)
		*directory_entry(PCI_WINDOW) = PCI_WINDOW | PTE_DEVICE;
}

void memory_init(void)
{
	const char *pages = arg_text("pages", "2m");
	uint64_t free_from;

	if (text_equal(pages, "4k"))
		mapping = PAGE_BYTES;
	else if (!text_equal(pages, "2m"))
		fail("runtime: pages=%s is neither 2m nor 4k", pages);

	next_table = (uint64_t)image_end;
	for (unsigned i = 0; i < boot_info.ram_ranges; i++) {
		const struct ram_range *ram = &boot_info.ram[i];

		if (ram->start <= next_table && next_table < ram->end)
			tables_limit = ram->end;
	}
	if (tables_limit > FIRST_TABLES_END)
		tables_limit = FIRST_TABLES_END;
	map_everything();
	free_from = next_table;

	start_cr3 = (uint64_t)root;
	kernel_call(SERVICE_SET_CR3, start_cr3, 0);

	for (unsigned i = 0; i < boot_info.ram_ranges; i++) {
		struct ram_range range = boot_info.ram[i];

		if (range.start < free_from)
			range.start = free_from;
		if (range.start < range.end)
			arena[arena_ranges++] = range;
	}
}

void *arena_alloc(uint64_t bytes, uint64_t align)
{
	for (unsigned i = 0; i < arena_ranges; i++) {
		uint64_t start = (arena[i].start + align - 1) & -align;

		if (start >= arena[i].end || arena[i].end - start < bytes)
			continue;
		arena[i].start = start + bytes;
		return (void *)start;
	}
	fail("runtime: no room for %llu bytes in %llu MiB of RAM", (unsigned long long)bytes,
	     (unsigned long long)(ram_bytes() / MIB));
}
