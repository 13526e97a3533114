/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/* What the parts of this guest share, and what tests read from its memory. */
#ifndef GUEST_H
#define GUEST_H

#include "virtio.h"

/* Interrupts of the devices: none that a board has. */
#define BLK_IRQ 5
#define CONSOLE_IRQ 6

#define RECORD_MAGIC 0x64726f636572766cull /* "lvrecord" */
#define RECORD_WORDS 509

/* One place of the disk: 4 KiB. */
struct record {
	uint64_t magic, number;
	uint64_t words[RECORD_WORDS];
	uint64_t checksum;
};

#define HEADER_MAGIC 0x6b73696476704c00ull

/* Its address is printed. All fields are 64 bits, in this order. */
struct disk_header {
	uint64_t magic;
	uint64_t places;
	uint64_t batch;
	uint64_t acknowledged; /* the last record that the disk has for good */
	uint64_t writing;      /* 1 while the next batch is on its way */
	uint64_t checks;
	uint64_t memory, memory_pass;
};

/* Whether there is a disk. */
bool blk_open(void);
void blk_records(void);
void blk_throughput(void);

/* Goes on forever; returns false where there is no console. */
bool console_echo(void);

#endif
