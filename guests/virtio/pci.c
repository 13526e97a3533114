/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/* Devices on PCI bus 0, and the virtio driver's part that is the same for all. */
#include "virtio.h"

#define PCI_ADDRESS 0xcf8
#define PCI_DATA 0xcfc
#define PCI_SLOTS 32

#define PCI_COMMAND 0x04
#define COMMAND_MEMORY 2u
#define COMMAND_MASTER 4u
#define PCI_BAR0 0x10
#define PCI_CAPABILITIES 0x34

#define CAP_VENDOR 0x09
#define CAP_MSIX 0x11
#define MSIX_ENABLE (1u << 31)

#define VIRTIO_VENDOR 0x1af4
#define VIRTIO_DEVICE 0x1040

enum part { PART_COMMON = 1, PART_NOTIFY, PART_ISR, PART_CONFIG };

/* Common configuration. */
#define C_DEVICE_SELECT 0x00
#define C_DEVICE_FEATURES 0x04
#define C_DRIVER_SELECT 0x08
#define C_DRIVER_FEATURES 0x0c
#define C_CONFIG_VECTOR 0x10
#define C_STATUS 0x14
#define C_QUEUE 0x16
#define C_QUEUE_SIZE 0x18
#define C_QUEUE_VECTOR 0x1a
#define C_QUEUE_ENABLE 0x1c
#define C_QUEUE_NOTIFY 0x1e
#define C_QUEUE_DESC 0x20
#define C_QUEUE_DRIVER 0x28
#define C_QUEUE_DEVICE 0x30

#define S_ACKNOWLEDGE 1
#define S_DRIVER 2
#define S_DRIVER_OK 4
#define S_FEATURES_OK 8
#define S_NEEDS_RESET 64

#define LAPIC_ID 0x20
#define MSI_ADDRESS 0xfee00000u

static uint32_t pci_read(unsigned slot, unsigned at)
{
	out32(PCI_ADDRESS, 1u << 31 | slot << 11 | (at & 0xfc));
	return in32(PCI_DATA);
}

static void pci_write(unsigned slot, unsigned at, uint32_t value)
{
	out32(PCI_ADDRESS, 1u << 31 | slot << 11 | (at & 0xfc));
	out32(PCI_DATA, value);
}

static uint8_t read8(const struct virtio_device *device, unsigned at)
{
	return device->common[at];
}

static uint16_t read16(const struct virtio_device *device, unsigned at)
{
	return *(volatile uint16_t *)(device->common + at);
}

static uint32_t read32(const struct virtio_device *device, unsigned at)
{
	return *(volatile uint32_t *)(device->common + at);
}

static void write8(const struct virtio_device *device, unsigned at, uint8_t value)
{
	device->common[at] = value;
}

static void write16(const struct virtio_device *device, unsigned at, uint16_t value)
{
	*(volatile uint16_t *)(device->common + at) = value;
}

static void write32(const struct virtio_device *device, unsigned at, uint32_t value)
{
	*(volatile uint32_t *)(device->common + at) = value;
}

/* 64-bit registers are written as two halves, as the specification allows. */
static void write64(const struct virtio_device *device, unsigned at, uint64_t value)
{
	write32(device, at, (uint32_t)value);
	write32(device, at + 4, (uint32_t)(value >> 32));
}

bool virtio_find(struct virtio_device *device, enum virtio_type type, unsigned index)
{
	for (unsigned slot = 0; slot < PCI_SLOTS; slot++) {
		uint32_t id = pci_read(slot, 0);

		if (id != (VIRTIO_VENDOR | (VIRTIO_DEVICE + (uint32_t)type) << 16))
			continue;
		if (index-- > 0)
			continue;
		memset(device, 0, sizeof(*device));
		device->slot = slot;
		device->type = type;
		return true;
	}
	return false;
}

/* Every vector of the device is the same interrupt. */
static void enable_msix(unsigned slot, unsigned at, uint64_t bar, unsigned irq)
{
	unsigned vectors = (pci_read(slot, at) >> 16 & 0x7ff) + 1;
	volatile uint32_t *table = (volatile uint32_t *)(bar + (pci_read(slot, at + 4) & ~7u));
	uint32_t id = lapic_read(LAPIC_ID);

	if (!lapic_is_x2apic())
		id >>= 24;
	for (unsigned i = 0; i < vectors; i++) {
		table[4 * i] = MSI_ADDRESS | id << 12;
		table[4 * i + 1] = 0;
		table[4 * i + 2] = IRQ_VECTOR + irq;
		table[4 * i + 3] = 0;
	}
	pci_write(slot, at, pci_read(slot, at) | MSIX_ENABLE);
}

static void read_capabilities(struct virtio_device *device, unsigned irq)
{
	unsigned slot = device->slot, at = pci_read(slot, PCI_CAPABILITIES) & 0xfc;
	uint64_t bar = pci_read(slot, PCI_BAR0) & ~15u;
	uint32_t command = pci_read(slot, PCI_COMMAND) & 0xffff;

	pci_write(slot, PCI_COMMAND, command | COMMAND_MEMORY | COMMAND_MASTER);
	while (at != 0) {
		uint32_t head = pci_read(slot, at);
		volatile uint8_t *part = (volatile uint8_t *)(bar + pci_read(slot, at + 8));

		if ((head & 0xff) == CAP_MSIX) {
			enable_msix(slot, at, bar, irq);
		} else if ((head & 0xff) == CAP_VENDOR) {
			switch (head >> 24) {
			case PART_COMMON:
				device->common = part;
				break;
			case PART_NOTIFY:
				device->notify = part;
				device->notify_step = pci_read(slot, at + 16);
				break;
			case PART_CONFIG:
				device->config = part;
				break;
			}
		}
		at = head >> 8 & 0xfc;
	}
	if (device->common == NULL || device->notify == NULL || device->config == NULL)
		fail("virtio: the device in slot %u lacks a capability", slot);
}

static void open_queue(struct virtio_device *device, unsigned number)
{
	struct virtqueue *queue = &device->queues[number];
	uint16_t size;

	write16(device, C_QUEUE, (uint16_t)number);
	size = read16(device, C_QUEUE_SIZE);
	if (size > QUEUE_SIZE_MAX)
		size = QUEUE_SIZE_MAX;
	write16(device, C_QUEUE_SIZE, size);
	queue->number = (uint16_t)number;
	queue->size = size;
	queue->taken = 0;
	queue->desc = arena_alloc(16ul * size, PAGE_BYTES);
	queue->driver = arena_alloc(6 + 2ul * size, PAGE_BYTES);
	queue->device = arena_alloc(6 + 8ul * size, PAGE_BYTES);
	queue->notify =
		(volatile uint16_t *)(device->notify + read16(device, C_QUEUE_NOTIFY) * device->notify_step);
	write64(device, C_QUEUE_DESC, (uint64_t)queue->desc);
	write64(device, C_QUEUE_DRIVER, (uint64_t)queue->driver);
	write64(device, C_QUEUE_DEVICE, (uint64_t)queue->device);
	write16(device, C_QUEUE_VECTOR, (uint16_t)number);
	if (read16(device, C_QUEUE_VECTOR) != number)
		fail("virtio: no interrupt for queue %u", number);
	write16(device, C_QUEUE_ENABLE, 1);
}

void virtio_open(struct virtio_device *device, uint64_t features, unsigned queues, unsigned irq)
{
	uint64_t offered;

	device->irq = irq;
	read_capabilities(device, irq);
	write8(device, C_STATUS, 0);
	while (read8(device, C_STATUS) != 0)
		cpu_relax();
	write8(device, C_STATUS, S_ACKNOWLEDGE | S_DRIVER);
	write32(device, C_DEVICE_SELECT, 0);
	offered = read32(device, C_DEVICE_FEATURES);
	write32(device, C_DEVICE_SELECT, 1);
	offered |= (uint64_t)read32(device, C_DEVICE_FEATURES) << 32;
	device->features = offered & (features | VIRTIO_F_VERSION_1);
	write32(device, C_DRIVER_SELECT, 0);
	write32(device, C_DRIVER_FEATURES, (uint32_t)device->features);
	write32(device, C_DRIVER_SELECT, 1);
	write32(device, C_DRIVER_FEATURES, (uint32_t)(device->features >> 32));
	write8(device, C_STATUS, S_ACKNOWLEDGE | S_DRIVER | S_FEATURES_OK);
	if (!(read8(device, C_STATUS) & S_FEATURES_OK))
		fail("virtio: the device in slot %u refuses its own features", device->slot);
	write16(device, C_CONFIG_VECTOR, (uint16_t)queues);
	for (unsigned i = 0; i < queues; i++)
		open_queue(device, i);
}

void virtio_ready(struct virtio_device *device)
{
	write8(device, C_STATUS, S_ACKNOWLEDGE | S_DRIVER | S_FEATURES_OK | S_DRIVER_OK);
}

unsigned virtio_status(const struct virtio_device *device)
{
	return read8(device, C_STATUS);
}

bool virtio_failed(const struct virtio_device *device)
{
	return read8(device, C_STATUS) & S_NEEDS_RESET;
}

uint32_t virtio_config32(const struct virtio_device *device, unsigned offset)
{
	return *(volatile uint32_t *)(device->config + offset);
}

uint64_t virtio_config64(const struct virtio_device *device, unsigned offset)
{
	return virtio_config32(device, offset) | (uint64_t)virtio_config32(device, offset + 4) << 32;
}
