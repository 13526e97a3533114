/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/* Split virtqueues, as their driver uses them. */
#include "virtio.h"

void virtio_put(struct virtqueue *queue, uint16_t first, const struct buffer *buffers, unsigned count)
{
	uint16_t index = queue->driver[1];

	for (unsigned i = 0; i < count; i++) {
		struct virtq_desc *desc = &queue->desc[first + i];

		desc->address = (uint64_t)buffers[i].address;
		desc->bytes = buffers[i].bytes;
		desc->flags = buffers[i].writable ? DESC_WRITE : 0;
		desc->next = (uint16_t)(first + i + 1);
		if (i + 1 < count)
			desc->flags |= DESC_NEXT;
	}
	queue->driver[2 + index % queue->size] = first;
	memory_barrier();
	queue->driver[1] = (uint16_t)(index + 1);
}

void virtio_kick(struct virtqueue *queue)
{
	memory_barrier();
	*queue->notify = queue->number;
}

bool virtio_take(struct virtqueue *queue, struct virtq_used_entry *entry)
{
	const volatile struct virtq_used_entry *ring = (const volatile void *)(queue->device + 2);

	if (queue->device[1] == queue->taken)
		return false;
	memory_barrier();
	entry->id = ring[queue->taken % queue->size].id;
	entry->bytes = ring[queue->taken % queue->size].bytes;
	queue->taken++;
	return true;
}

struct virtq_used_entry virtio_wait(struct virtio_device *device, struct virtqueue *queue)
{
	struct virtq_used_entry entry;

	/* An interrupt may be about an entry that was taken before. */
	while (!virtio_take(queue, &entry)) {
		wait_for_irq();
		end_of_irq();
		if (queue->device[1] == queue->taken && virtio_failed(device))
			fail("virtio: the device in slot %u gave up, status=0x%x", device->slot, virtio_status(device));
	}
	return entry;
}
