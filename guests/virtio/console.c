/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * Sends back what is typed at each virtio console. A buffer goes from one
 * queue to the other and back, so that bytes are at any moment in the host,
 * in a buffer that the device has filled, or in one that it is sending.
 */
#include "guest.h"

#define CONSOLES_MAX 4
#define BUFFERS 16
#define BUFFER_BYTES 1024

enum { RECEIVE, TRANSMIT, QUEUES };

struct console {
	struct virtio_device device;
	uint8_t (*buffers)[BUFFER_BYTES];
};

static struct console consoles[CONSOLES_MAX];

static void put(struct console *console, unsigned queue, uint32_t at, uint32_t bytes)
{
	struct buffer part = {console->buffers[at], bytes, queue == RECEIVE};

	virtio_put(&console->device.queues[queue], (uint16_t)at, &part, 1);
	virtio_kick(&console->device.queues[queue]);
}

/* Passes on what the device is done with; false where that is nothing. */
static bool serve(struct console *console)
{
	struct virtq_used_entry entry;
	bool served = false;

	for (; virtio_take(&console->device.queues[RECEIVE], &entry); served = true)
		put(console, TRANSMIT, entry.id, entry.bytes);
	for (; virtio_take(&console->device.queues[TRANSMIT], &entry); served = true)
		put(console, RECEIVE, entry.id, BUFFER_BYTES);
	return served;
}

bool console_echo(void)
{
	unsigned count = 0;

	while (count < CONSOLES_MAX && virtio_find(&consoles[count].device, VIRTIO_CONSOLE, count)) {
		struct console *console = &consoles[count++];

		console->buffers = arena_alloc(BUFFERS * BUFFER_BYTES, PAGE_BYTES);
		virtio_open(&console->device, 0, QUEUES, CONSOLE_IRQ);
		virtio_ready(&console->device);
		for (uint32_t at = 0; at < BUFFERS; at++)
			put(console, RECEIVE, at, BUFFER_BYTES);
	}
	if (count == 0)
		return false;
	print("virtio: console ready consoles=%u\n", count);
	for (;;) {
		bool served = false;

		for (unsigned i = 0; i < count; i++)
			served |= serve(&consoles[i]);
		if (served)
			continue;
		for (unsigned i = 0; i < count; i++)
			if (virtio_failed(&consoles[i].device))
				fail("virtio: the console in slot %u gave up", consoles[i].device.slot);
		wait_for_irq();
		end_of_irq();
	}
}
