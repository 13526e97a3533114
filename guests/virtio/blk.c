/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * Writes numbered records to a disk, and checks that they are there.
 *
 * Record n is in place n % places. Records are written in batches, with a
 * flush after each; `acknowledged` in the header is the last one that the disk
 * said it has. At any moment each place has the newest record up to that one,
 * but for the places of the next batch, which may have a newer one already.
 * That must hold of a disk and the memory that were saved together.
 */
#include "guest.h"

#define BLK_IN 0
#define BLK_OUT 1
#define BLK_FLUSH 4
#define BLK_F_FLUSH (1ull << 9)

#define SECTOR_BYTES 512
#define BATCH_MAX 16
#define DESCS 3 /* of a request */

struct request {
	uint32_t type, reserved;
	uint64_t sector;
	volatile uint8_t status;
} __attribute__((aligned(32)));

static struct virtio_device device;
static struct request requests[BATCH_MAX + 1];
static struct record *buffers;
static struct disk_header *header;
static unsigned batch;

static uint64_t mix(uint64_t value)
{
	value ^= value >> 30;
	value *= 0xbf58476d1ce4e5b9ull;
	value ^= value >> 27;
	value *= 0x94d049bb133111ebull;
	return value ^ value >> 31;
}

static void make_record(struct record *record, uint64_t number)
{
	uint64_t sum = number;

	record->magic = RECORD_MAGIC;
	record->number = number;
	for (unsigned i = 0; i < RECORD_WORDS; i++) {
		record->words[i] = mix(number * RECORD_WORDS + i);
		sum = mix(sum ^ record->words[i]);
	}
	record->checksum = sum;
}

/* Whether a place has this record; number 0 is a place that was never written. */
static bool has_record(const struct record *record, uint64_t number)
{
	uint64_t sum = number;

	if (number == 0)
		return record->magic == 0 && record->number == 0;
	if (record->magic != RECORD_MAGIC || record->number != number)
		return false;
	for (unsigned i = 0; i < RECORD_WORDS; i++)
		sum = mix(sum ^ record->words[i]);
	return record->checksum == sum;
}

static void submit(unsigned at, uint32_t type, uint64_t place, void *data, uint32_t bytes)
{
	struct request *request = &requests[at];
	struct buffer parts[DESCS] = {{request, 16, false}, {data, bytes, type == BLK_IN}, {0}};
	unsigned count = bytes > 0 ? 2 : 1;

	request->type = type;
	request->sector = place * (sizeof(struct record) / SECTOR_BYTES);
	request->status = 0xff;
	parts[count] = (struct buffer){&request->status, 1, true};
	virtio_put(&device.queues[0], (uint16_t)(DESCS * at), parts, count + 1);
}

static void wait_for(unsigned count)
{
	virtio_kick(&device.queues[0]);
	for (unsigned done = 0; done < count; done++) {
		struct virtq_used_entry entry = virtio_wait(&device, &device.queues[0]);
		const struct request *request = &requests[entry.id / DESCS];

		if (request->status != 0)
			fail("virtio: blk request type=%u sector=%lu status=%u", request->type, request->sector,
			     request->status);
	}
}

static void flush(void)
{
	submit(BATCH_MAX, BLK_FLUSH, 0, NULL, 0);
	wait_for(1);
}

/* The number of the newest record that a place has, of those up to `last`. */
static uint64_t newest_in(uint64_t place, uint64_t last)
{
	uint64_t places = header->places;

	if (place == 0)
		return last - last % places;
	if (last < place)
		return 0;
	return last - (last - place) % places;
}

static void check_place(uint64_t place, const struct record *record)
{
	uint64_t acknowledged = header->acknowledged;
	uint64_t expected = newest_in(place, acknowledged);
	uint64_t newer = newest_in(place, acknowledged + batch);

	if (has_record(record, expected) || (header->writing && newer != expected && has_record(record, newer)))
		return;
	fail("virtio: blk WRONG place=%lu expected=%lu found=%lu magic=0x%lx acknowledged=%lu", place, expected,
	     record->number, record->magic, acknowledged);
}

/* Reads the whole disk. */
static void check_all(void)
{
	for (uint64_t place = 0; place < header->places; place += batch) {
		unsigned count = 0;

		while (count < batch && place + count < header->places) {
			submit(count, BLK_IN, place + count, &buffers[count], sizeof(struct record));
			count++;
		}
		wait_for(count);
		for (unsigned i = 0; i < count; i++)
			check_place(place + i, &buffers[i]);
	}
	header->checks++;
	print("virtio: blk checked places=%lu acknowledged=%lu checks=%lu\n", header->places, header->acknowledged,
	      header->checks);
}

static void write_batch(void)
{
	/* Before the first request is there to be seen: the device may still be looking for more. */
	header->writing = 1;
	for (unsigned i = 0; i < batch; i++) {
		uint64_t number = header->acknowledged + 1 + i;

		make_record(&buffers[i], number);
		submit(i, BLK_OUT, number % header->places, &buffers[i], sizeof(struct record));
	}
	wait_for(batch);
	flush();
	header->acknowledged += batch;
	memory_barrier();
	header->writing = 0;
}

/* The device lost nothing of the guest's own memory either. */
static void check_memory(uint64_t pages)
{
	for (uint64_t page = 0; page < pages; page++) {
		uint64_t *word = (uint64_t *)(header->memory + page * PAGE_BYTES);

		if (*word != mix(header->memory_pass + page))
			fail("virtio: memory WRONG page=%lu pass=%lu", page, header->memory_pass);
		*word = mix(header->memory_pass + 1 + page);
	}
	header->memory_pass++;
}

static void open_disk(void)
{
	uint64_t bytes, limit = arg_number("places", 0);

	virtio_open(&device, BLK_F_FLUSH, 1, BLK_IRQ);
	virtio_ready(&device);
	batch = (unsigned)arg_number("batch", 4);
	if (batch == 0 || batch > BATCH_MAX)
		fail("virtio: batch=%u is not from 1 to %u", batch, BATCH_MAX);
	buffers = arena_alloc(BATCH_MAX * sizeof(struct record), PAGE_BYTES);
	header = arena_alloc(sizeof(*header), PAGE_BYTES);
	bytes = virtio_config64(&device, 0) * SECTOR_BYTES;
	header->magic = HEADER_MAGIC;
	header->places = bytes / sizeof(struct record);
	if (limit != 0 && limit < header->places)
		header->places = limit;
	if (header->places <= 2 * batch)
		fail("virtio: the disk has only %lu places", header->places);
	header->batch = batch;
	print("virtio: blk header=0x%lx places=%lu batch=%u flush=%u\n", (uint64_t)header, header->places, batch,
	      (device.features & BLK_F_FLUSH) != 0);
}

void blk_records(void)
{
	uint64_t last = arg_number("records", 0), pages = arg_number("pages_written", 256), started = rdtsc();
	uint64_t tick = arg_number("tick", 64);

	open_disk();
	header->memory = (uint64_t)arena_alloc(pages * PAGE_BYTES, PAGE_BYTES);
	for (uint64_t page = 0; page < pages; page++)
		*(uint64_t *)(header->memory + page * PAGE_BYTES) = mix(page);
	print("virtio: blk ready\n");
	while (last == 0 || header->acknowledged < last) {
		write_batch();
		check_memory(pages);
		if (header->acknowledged % (tick * batch) == 0) {
			print("virtio: blk record=%lu tsc=%lu\n", header->acknowledged, rdtsc());
			check_all();
		}
	}
	check_all();
	print("virtio: blk done records=%lu cycles=%lu\n", header->acknowledged, rdtsc() - started);
}

/* One pass over the disk with requests of `bytes`, `batch` at a time. */
static void one_pass(const char *name, uint32_t type, uint64_t disk_bytes, uint32_t bytes, uint8_t *data)
{
	uint64_t done = 0, started = rdtsc(), cycles;
	uint64_t per_request = bytes / sizeof(struct record);

	while (done + (uint64_t)batch * bytes <= disk_bytes) {
		for (unsigned i = 0; i < batch; i++)
			submit(i, type, done / sizeof(struct record) + i * per_request, data + (uint64_t)i * bytes,
			       bytes);
		wait_for(batch);
		done += (uint64_t)batch * bytes;
	}
	if (type == BLK_OUT)
		flush();
	cycles = rdtsc() - started;
	print("virtio: blk %s bytes=%lu request=%u batch=%u cycles=%lu mb_per_s=%.1f\n", name, done, bytes, batch,
	      cycles, tsc_khz() == 0 ? 0 : (double)done * (double)tsc_khz() / (double)cycles / 1000);
}

void blk_throughput(void)
{
	uint32_t bytes = (uint32_t)arg_number("request", 256 * KIB);
	uint64_t disk_bytes;
	uint8_t *data;

	open_disk();
	if (bytes < sizeof(struct record) || bytes % sizeof(struct record) != 0)
		fail("virtio: request=%u is not a multiple of 4096", bytes);
	disk_bytes = header->places * sizeof(struct record);
	data = arena_alloc((uint64_t)batch * bytes, PAGE_BYTES);
	memset(data, 0x5a, (uint64_t)batch * bytes);
	for (uint64_t pass = 0; pass < arg_number("passes", 2); pass++) {
		one_pass("write", BLK_OUT, disk_bytes, bytes, data);
		one_pass("read", BLK_IN, disk_bytes, bytes, data);
	}
	print("virtio: blk done\n");
}

bool blk_open(void)
{
	return virtio_find(&device, VIRTIO_BLK, 0);
}
