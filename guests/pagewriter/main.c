/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * Writes the number of each pass into every page of a working set, in a fixed
 * order. A copy of memory that is of one moment has, for each vCPU, one place
 * in that order before which pages have the new number and behind which they
 * have the old one; any other copy has not.
 */
#include "pagewriter.h"

#define BATCH_PAGES 16
/* Below this rate a batch of pages would make bursts. */
#define SINGLE_PAGE_RATE (64 * MIB)
/* What a throttled writer may catch up after a stall. */
#define CATCH_UP_MS 10
#define TSC_KHZ_ASSUMED 1000000ul
/* How long intervals are in memory when none are printed. */
#define TICK_MS_UNPRINTED 100

enum verify { VERIFY_NONE, VERIFY_HEADER, VERIFY_FULL };

static unsigned vcpus;
static enum verify verify;
static uint64_t khz, tick_cycles;
static bool print_ticks;
static volatile unsigned layout_made, filled, go, done;

struct writer {
	unsigned cpu;
	const struct vcpu_share *share;
	struct live *live;
	uint64_t batch, batch_cycles; /* 0 cycles: not throttled */
	uint64_t pages_to_look; /* left of the batch */
	uint64_t next_batch, next_tick, last_seen;
};

static void add(volatile unsigned *counter)
{
	__atomic_fetch_add(counter, 1, __ATOMIC_SEQ_CST);
}

static void wait_for(const volatile unsigned *counter, unsigned value)
{
	while (__atomic_load_n(counter, __ATOMIC_SEQ_CST) < value)
		cpu_relax();
}

/* Notes how long ago the TSC was last read here: what the vCPU was kept from
   running, when that is more than a batch takes. */
static uint64_t look_at_tsc(struct writer *writer)
{
	struct live *live = writer->live;
	uint64_t now = rdtsc(), gap = now - writer->last_seen;

	if (gap > live->max_gap) {
		live->max_gap = gap;
		live->max_gap_tsc = now;
		if (gap > live->max_gap_ever) {
			live->max_gap_ever = gap;
			live->max_gap_ever_tsc = now;
		}
	}
	live->tsc = now;
	writer->last_seen = now;
	return now;
}

static void end_interval(struct writer *writer, uint64_t now)
{
	struct live *live = writer->live;
	uint64_t progress = live->progress;

	live->interval[live->intervals % INTERVALS_KEPT] =
		(struct interval){now, progress, live->max_gap, live->max_gap_tsc};
	live->intervals++;
	if (print_ticks) {
		print("tick cpu=%u tsc=%lu pass=%lu pages=%lu printing=%lu max_gap=%lu at=%lu\n", writer->cpu, now,
		      progress / writer->share->pages + 1, progress, live->printing_cycles, live->max_gap,
		      live->max_gap_tsc);
	}
	live->max_gap = 0;
	live->max_gap_tsc = 0;

	/* Printing takes milliseconds, waits for other vCPUs, and is no gap. */
	writer->last_seen = rdtsc();
	live->printing_cycles += writer->last_seen - now;
	writer->next_tick = now + tick_cycles;
	if (writer->next_tick < writer->last_seen)
		writer->next_tick = writer->last_seen + tick_cycles;
}

static void after_batch(struct writer *writer)
{
	uint64_t now = look_at_tsc(writer);

	if (now >= writer->next_tick)
		end_interval(writer, now);
	if (writer->batch_cycles == 0)
		return;
	writer->next_batch += writer->batch_cycles;
	if (writer->next_batch + CATCH_UP_MS * khz < now)
		writer->next_batch = now;
	while (now < writer->next_batch) {
		cpu_relax();
		now = look_at_tsc(writer);
		if (now >= writer->next_tick)
			end_interval(writer, now);
	}
}

static _Noreturn void report_corruption(const struct writer *writer, uint64_t gpa, uint64_t position, uint64_t pass)
{
	const struct ws_page *page = (const struct ws_page *)gpa;

	fail("pagewriter: CORRUPT cpu=%u gpa=0x%lx position=%lu expected_pass=%lu found magic=0x%lx gpa=0x%lx "
	     "pass=%lu position=%lu pass_again=%lu tsc=%lu",
	     writer->cpu, gpa, position, pass, page->magic, page->gpa, page->pass, page->position, page->pass_again,
	     rdtsc());
}

/* A page must still be as the last pass left it: after a restore this finds
   what was lost, though nobody looked at the image. */
static void check_page(const struct writer *writer, uint64_t gpa, uint64_t position, uint64_t pass)
{
	const struct ws_page *page = (const struct ws_page *)gpa;
	uint64_t whole_pass = header()->write == WRITE_PAGE ? pass : 0;

	if (page->pass != pass || page->gpa != gpa || page->position != position)
		report_corruption(writer, gpa, position, pass);
	if (verify == VERIFY_FULL && !ws_page_is_whole(gpa, whole_pass))
		report_corruption(writer, gpa, position, pass);
}

static void write_pass(struct writer *writer, uint64_t pass)
{
	const struct vcpu_share *share = writer->share;
	bool whole = header()->write == WRITE_PAGE;

	for (uint64_t position = 0; position < share->pages; position++) {
		uint64_t gpa = page_at_position(share, position);

		if (verify != VERIFY_NONE)
			check_page(writer, gpa, position, pass - 1);
		if (whole)
			ws_page_write(gpa, writer->cpu, position, pass);
		else
			((struct ws_page *)gpa)->pass = pass;
		/* One store after the page: see the oracle in README.md. */
		writer->live->progress++;
		if (--writer->pages_to_look == 0) {
			writer->pages_to_look = writer->batch;
			after_batch(writer);
		}
	}
}

static void fill_share(unsigned cpu)
{
	const struct vcpu_share *share = &header()->share[cpu];
	uint64_t pages = fill_pages();

	for (uint64_t i = pages * cpu / vcpus; i < pages * (cpu + 1) / vcpus; i++)
		fill_page_write(fill_page_gpa(i), i);
	for (uint64_t position = 0; position < share->pages; position++)
		ws_page_write(page_at_position(share, position), cpu, position, 0);
}

static void check_fill_share(unsigned cpu)
{
	uint64_t pages = fill_pages();

	for (uint64_t i = pages * cpu / vcpus; i < pages * (cpu + 1) / vcpus; i++) {
		if (!fill_page_is_whole(fill_page_gpa(i), i))
			fail("pagewriter: CORRUPT fill gpa=0x%lx", fill_page_gpa(i));
	}
}

static void set_pace(struct writer *writer)
{
	uint64_t rate = header()->rate / vcpus;

	writer->batch = BATCH_PAGES;
	if (header()->rate != 0) {
		if (rate < SINGLE_PAGE_RATE)
			writer->batch = 1;
		writer->batch_cycles = writer->batch * PAGE_BYTES * khz * 1000 / (rate == 0 ? 1 : rate);
	}
	writer->pages_to_look = writer->batch;
}

/* The BSP, vCPU 0, starts all when the last one has filled its share. */
static void start_together(unsigned cpu)
{
	add(&filled);
	if (cpu == 0) {
		wait_for(&filled, vcpus);
		header()->state = STATE_RUNNING;
		print("pagewriter: ready tsc=%lu fill_pages=%lu\n", rdtsc(), fill_pages());
		add(&go);
	}
	wait_for(&go, 1);
}

/* All that a vCPU does. */
static void write_pages(unsigned cpu)
{
	struct writer writer = {.cpu = cpu, .live = live(cpu)};
	uint64_t passes, start, cycles;

	wait_for(&layout_made, 1);
	passes = header()->passes;
	writer.share = &header()->share[cpu];
	set_pace(&writer);
	fill_share(cpu);
	start_together(cpu);

	start = rdtsc();
	writer.last_seen = start;
	writer.next_batch = start;
	writer.next_tick = start + tick_cycles;
	for (uint64_t pass = 1; passes == 0 || pass <= passes; pass++)
		write_pass(&writer, pass);
	cycles = rdtsc() - start;

	if (verify == VERIFY_FULL)
		check_fill_share(cpu);
	print("done cpu=%u passes=%lu pages=%lu tsc_cycles=%lu printing_cycles=%lu max_gap=%lu at=%lu tsc_khz=%lu\n",
	      cpu, passes, writer.live->progress, cycles, writer.live->printing_cycles, writer.live->max_gap_ever,
	      writer.live->max_gap_ever_tsc, header()->tsc_khz);
	add(&done);
}

static void read_options(void)
{
	uint64_t tick_ms = arg_number("tick_ms", 100);
	const char *text = arg_text("verify", "header");

	vcpus = (unsigned)arg_number("vcpus", 1);
	if (vcpus < 1 || vcpus > MAX_CPUS)
		fail("pagewriter: error: vcpus=%u is not 1 to %u", vcpus, MAX_CPUS);
	if (text_equal(text, "none"))
		verify = VERIFY_NONE;
	else if (text_equal(text, "header"))
		verify = VERIFY_HEADER;
	else if (text_equal(text, "full"))
		verify = VERIFY_FULL;
	else
		fail("pagewriter: error: verify=%s is not known", text);
	khz = tsc_khz();
	if (khz == 0)
		khz = TSC_KHZ_ASSUMED;
	print_ticks = tick_ms != 0;
	tick_cycles = (print_ticks ? tick_ms : TICK_MS_UNPRINTED) * khz;
}

static void clear_published_pages(void)
{
	memset(header(), 0, PAGE_BYTES);
	for (unsigned cpu = 0; cpu < vcpus; cpu++) {
		memset(live(cpu), 0, PAGE_BYTES);
		live(cpu)->magic = LIVE_MAGIC;
		live(cpu)->vcpu = cpu;
	}
}

void guest_main(void)
{
	read_options();
	print("pagewriter: start tsc=%lu ram=%lu mapping=%lu\n", rdtsc(), ram_bytes(), mapping_bytes());
	/* Before the layout takes all memory that is left. */
	smp_start(vcpus, write_pages);
	clear_published_pages();
	layout_make(vcpus);
	layout_print();
	add(&layout_made);

	write_pages(0);
	wait_for(&done, vcpus);
	header()->state = STATE_DONE;
	print("pagewriter: done tsc=%lu\n", rdtsc());
}
