/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/* The first C code, and what the two boot protocols tell. */
#include "machine.h"

/* Of boot_params, the "zero page" of the Linux boot protocol. */
#define BOOT_PARAMS_E820_ENTRIES 0x1e8
#define BOOT_PARAMS_CMD_LINE_PTR 0x228
#define BOOT_PARAMS_EXT_CMD_LINE_PTR 0x0c8
#define BOOT_PARAMS_E820_TABLE 0x2d0

#define MEMORY_TYPE_RAM 1

struct __attribute__((packed)) e820_entry {
	uint64_t start, bytes;
	uint32_t type;
};

#define PVH_MAGIC 0x336ec578

struct pvh_start_info {
	uint32_t magic, version, flags, module_count;
	uint64_t modules_gpa, cmdline_gpa, rsdp_gpa;
	uint64_t memory_map_gpa; /* from version 1 on */
	uint32_t memory_map_entries, reserved;
};

struct pvh_memory_map_entry {
	uint64_t start, bytes;
	uint32_t type, reserved;
};

struct boot_info boot_info;

static void add_ram(uint64_t start, uint64_t bytes, uint32_t type)
{
	struct ram_range *range = &boot_info.ram[boot_info.ram_ranges];

	if (type != MEMORY_TYPE_RAM || boot_info.ram_ranges == MAX_RAM_RANGES)
		return;
	range->start = (start + PAGE_BYTES - 1) & -PAGE_BYTES;
	range->end = (start + bytes) & -PAGE_BYTES;
	if (range->start < range->end)
		boot_info.ram_ranges++;
}

static void copy_cmdline(uint64_t gpa)
{
	const char *from = (const char *)gpa;
	size_t length = 0;

	if (gpa == 0)
		return;
	while (length < sizeof(boot_info.cmdline) - 1 && from[length] != '\0') {
		boot_info.cmdline[length] = from[length];
		length++;
	}
	boot_info.cmdline[length] = '\0';
}

static void read_boot_params(uint64_t gpa)
{
	const char *params = (const char *)gpa;
	const struct e820_entry *entry = (const void *)(params + BOOT_PARAMS_E820_TABLE);
	unsigned entries = (uint8_t)params[BOOT_PARAMS_E820_ENTRIES];
	uint32_t low, high;

	for (unsigned i = 0; i < entries; i++)
		add_ram(entry[i].start, entry[i].bytes, entry[i].type);
	memcpy(&low, params + BOOT_PARAMS_CMD_LINE_PTR, sizeof(low));
	memcpy(&high, params + BOOT_PARAMS_EXT_CMD_LINE_PTR, sizeof(high));
	copy_cmdline((uint64_t)high << 32 | low);
}

static void read_pvh_start_info(uint64_t gpa)
{
	const struct pvh_start_info *info = (const void *)gpa;
	const struct pvh_memory_map_entry *entry;

	if (info->magic != PVH_MAGIC || info->version < 1)
		return;
	entry = (const void *)info->memory_map_gpa;
	for (unsigned i = 0; i < info->memory_map_entries; i++)
		add_ram(entry[i].start, entry[i].bytes, entry[i].type);
	copy_cmdline(info->cmdline_gpa);
}

void boot_info_read(void)
{
	if (pvh_start_info_gpa != 0)
		read_pvh_start_info(pvh_start_info_gpa);
	else
		read_boot_params(boot_params_gpa);
}

/* Where entry.S arrives, at CPL3, on the BSP. */
_Noreturn void runtime_start(void)
{
	cpu_init();
	serial_init();
	boot_info_read();
	args_parse(boot_info.cmdline);
	memory_init();
	guest_main();
	power_off();
}
