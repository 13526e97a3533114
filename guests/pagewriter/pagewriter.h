/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/* The pages that the page writer leaves in memory. guests/README.md describes
   them for those who check a checkpoint against them. */
#ifndef PAGEWRITER_H
#define PAGEWRITER_H

#include "runtime.h"

#define PAGE_WORDS 512
#define ROW_WORDS 8
#define SEGMENTS_MAX 8

#define MAGIC(text)                                                                                                    \
	((uint64_t)(text)[0] | (uint64_t)(text)[1] << 8 | (uint64_t)(text)[2] << 16 | (uint64_t)(text)[3] << 24 |      \
	 (uint64_t)(text)[4] << 32 | (uint64_t)(text)[5] << 40 | (uint64_t)(text)[6] << 48 | (uint64_t)(text)[7] << 56)

#define PAGE_MAGIC MAGIC("LVPPAGE1")
#define HEADER_MAGIC MAGIC("LVPHEAD1")
#define LIVE_MAGIC MAGIC("LVPLIVE1")

/* Below the image, where no loader puts anything. */
#define HEADER_GPA 0x100000ul
#define LIVE_GPA(cpu) (HEADER_GPA + PAGE_BYTES * (1 + (cpu)))

/* A page of the working set. The words from `stream` on are pseudo-random. */
struct ws_page {
	uint64_t magic, gpa, vcpu;
	volatile uint64_t pass;
	uint64_t position, vcpu_pages, seed, check;
	uint64_t stream[PAGE_WORDS - 2 * ROW_WORDS];
	uint64_t last_row[ROW_WORDS - 1];
	uint64_t pass_again;
};

_Static_assert(sizeof(struct ws_page) == PAGE_BYTES, "a page of the working set is a page");

struct segment {
	uint64_t gpa, pages;
};

enum state { STATE_FILLING, STATE_RUNNING, STATE_DONE };
enum pattern { PATTERN_SEQUENTIAL, PATTERN_RANDOM };
enum write { WRITE_WORD, WRITE_PAGE };
enum fill { FILL_NONE, FILL_ZERO, FILL_INCOMPRESSIBLE, FILL_MIX };

struct vcpu_share {
	uint64_t first, pages; /* of the working set's pages, in segment order */
	uint64_t order_seed, live_gpa;
};

/* At HEADER_GPA. Constant once the state is STATE_RUNNING. */
struct header {
	uint64_t magic, version;
	volatile uint64_t state;
	uint64_t vcpus, ws_pages, pattern, write, seed;
	uint64_t tsc_khz, rate, passes, fill;
	uint64_t ws_segments;
	struct segment ws[SEGMENTS_MAX];
	uint64_t fill_segments;
	struct segment fills[SEGMENTS_MAX];
	uint64_t reserved[18];
	struct vcpu_share share[MAX_CPUS];
};

_Static_assert(offsetof(struct header, share) == 64 * 8, "README.md says word 64");

struct interval {
	uint64_t tsc, progress, max_gap, max_gap_tsc;
};

#define INTERVALS_KEPT 120

/* At LIVE_GPA(cpu). Changes all the time. */
struct live {
	uint64_t magic, vcpu;
	volatile uint64_t progress; /* pages written since the start, over all passes */
	volatile uint64_t tsc;
	uint64_t max_gap, max_gap_tsc;           /* since the last interval ended */
	uint64_t max_gap_ever, max_gap_ever_tsc; /* since the start */
	uint64_t intervals, printing_cycles, reserved[6];
	struct interval interval[INTERVALS_KEPT]; /* a ring: interval n is at n % 120 */
};

static inline struct header *header(void)
{
	uint64_t gpa = HEADER_GPA;

	/* Hidden from gcc, which takes a constant address for a mistake. */
	__asm__("" : "+r"(gpa));
	return (struct header *)gpa;
}

static inline struct live *live(unsigned cpu)
{
	uint64_t gpa = LIVE_GPA(cpu);

	__asm__("" : "+r"(gpa));
	return (struct live *)gpa;
}

/* layout.c */
void layout_make(unsigned vcpus);
void layout_print(void);
uint64_t ws_page_gpa(uint64_t index);
uint64_t page_at_position(const struct vcpu_share *share, uint64_t position);
uint64_t fill_pages(void);
uint64_t fill_page_gpa(uint64_t index);

/* content.c */
void ws_page_write(uint64_t gpa, unsigned vcpu, uint64_t position, uint64_t pass);
bool ws_page_is_whole(uint64_t gpa, uint64_t pass);
void fill_page_write(uint64_t gpa, uint64_t index);
bool fill_page_is_whole(uint64_t gpa, uint64_t index);

#endif
