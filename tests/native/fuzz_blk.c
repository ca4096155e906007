/* Fuzzes the block device's queue: any rings, any requests. What must hold whatever the driver
 * does: no access outside guest memory (AddressSanitizer), each request completed once (assert),
 * an end to each run, and an image that keeps its size, and its contents when it is read-only or
 * the base of a snapshot.
 *
 * The input is a few bytes of set-up, then chains in a compact form, so that mutations mostly
 * yield chains that get past the ring, then bytes to put anywhere in guest memory. */
#include <linux/virtio_blk.h>
#include <linux/virtio_ring.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "blk_snapshot.h"
#include "fuzz_input.h"
#include "virtio_blk.h"

enum {
    QUEUE_SIZE = 16,
    AVAIL = 0x100,
    USED = 0x200,
    BUFFERS = 0x400,
    RAM = 0x4000,
    IMAGE = 0x8000,
};

/* A request: type, sector, a data buffer or segments, framed in one of some ways. Returns the
 * number of descriptors taken. */
static unsigned add_chain(struct input *input, uint8_t *ram, unsigned desc_index, uint64_t *buffer)
{
    static const uint32_t types[] = {
        VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
        VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_T_SECURE_ERASE, 0xFFFFFFFF,
    };
    struct vring_desc *table = (struct vring_desc *)ram;
    struct virtio_blk_outhdr header = {
        .type = types[take(input, 1) % 8],
        .sector = take(input, 1),
    };
    unsigned shape = (unsigned)take(input, 1);
    unsigned count = 1 + shape % 4;

    if (shape & 0x80)
        header.sector = take(input, 8);
    memcpy(ram + *buffer, &header, sizeof(header));
    for (unsigned i = 0; i < 64; i++)
        ram[*buffer + sizeof(header) + i] = (uint8_t)take(input, shape & 0x40 ? 1 : 0);
    for (unsigned i = 0; i < count; i++) {
        uint32_t length = (uint32_t)take(input, 1);
        bool writable = i > 0 && (i + 1 == count || (shape & 0x10));

        if (i == 0)
            length = shape & 0x20 ? length : sizeof(header);
        else if (shape & 0x08)
            length *= 512 / 4;
        table[desc_index + i] = (struct vring_desc){
            .addr = *buffer,
            .len = length,
            .flags = (writable ? VRING_DESC_F_WRITE : 0) |
                     (i + 1 < count ? VRING_DESC_F_NEXT : 0),
            .next = (uint16_t)(desc_index + i + 1),
        };
        *buffer += i == 0 ? (length < 16 ? 16 : length) : 0;
        *buffer %= RAM - BUFFERS - 512;
        if (*buffer < BUFFERS)
            *buffer += BUFFERS;
    }
    *buffer += 128;
    return count;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input input = {data, size};
    unsigned setup = (unsigned)take(&input, 1);
    const struct virtq_config config = {0, AVAIL, USED, QUEUE_SIZE, setup & 1, setup & 2};
    uint8_t *ram = calloc(1, RAM); /* on the heap, for AddressSanitizer */
    const struct guest_mem memory = {1, {{0, RAM, ram}}};
    struct blk_image image = {
        .fd = memfd_create("fuzz", MFD_CLOEXEC),
        .size = IMAGE,
        .block_size = setup & 4 ? 4096 : 512,
        .buffer_align = setup & 8 ? 512 : 1,
    };
    struct blk_image writable = image;
    struct blk_snapshot *snapshot = NULL;
    struct virtio_blk_device device = {
        .image = &image,
        .readonly = setup & 16,
        .writethrough = setup & 32,
        .serial = "fuzz",
    };
    struct virtio_irq irq = {.status = &(uint32_t){0}, .irqfd = -1};
    int kick = eventfd(0, EFD_NONBLOCK);
    struct virtio_blk_queue *queue;
    struct vring_avail *avail = (struct vring_avail *)(ram + AVAIL);
    uint64_t buffer = BUFFERS;
    unsigned desc_index = 0;
    struct stat status;

    if (ftruncate(image.fd, IMAGE) < 0 || pwrite(image.fd, "image", 5, 0) != 5)
        abort();
    if (setup & 128) {
        snapshot = blk_snapshot_create(&image, memfd_create("overlay", MFD_CLOEXEC), IMAGE);
        if (!snapshot || ftruncate(snapshot->overlay.fd, IMAGE) < 0)
            abort();
        writable.fd = -1;
        writable.snapshot = snapshot;
        device.image = &writable;
    }
    queue = virtio_blk_queue_create(&device, BLK_ENGINE_SYNC, &memory, &config, kick, &irq);
    if (!queue)
        abort();

    while (input.size > 0 && desc_index + 4 <= QUEUE_SIZE && !(setup & 64)) {
        avail->ring[avail->idx++ % QUEUE_SIZE] = (uint16_t)desc_index;
        desc_index += add_chain(&input, ram, desc_index, &buffer);
    }
    while (input.size > 0) {
        uint64_t gpa = take(&input, 2) % RAM;

        ram[setup & 64 ? gpa % BUFFERS : gpa] = (uint8_t)take(&input, 1);
    }

    virtio_blk_queue_stop(queue); /* so that it makes one pass */
    if (virtio_blk_queue_run(queue) < 0)
        abort();
    virtio_blk_queue_destroy(queue);

    if (fstat(image.fd, &status) < 0 || status.st_size != IMAGE)
        abort();
    if (device.readonly || snapshot) {
        static uint8_t expected[IMAGE] = "image", contents[IMAGE];

        if (pread(image.fd, contents, IMAGE, 0) != IMAGE ||
            memcmp(contents, expected, IMAGE) != 0)
            abort();
    }
    if (snapshot)
        close(snapshot->overlay.fd);
    blk_snapshot_destroy(snapshot);
    close(image.fd);
    close(kick);
    free(ram);
    return 0;
}
