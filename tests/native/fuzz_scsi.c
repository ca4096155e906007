/* Fuzzes the SCSI host device's request queue with disks behind it: any rings, any commands. What
 * must hold whatever the driver does: no access outside guest memory (AddressSanitizer), each
 * command completed once (assert), an end to each run, and an image that keeps its size, and its
 * contents when it is read-only. A thread stands for Python and ends the commands that are its.
 *
 * The input is a few bytes of set-up, then chains in a compact form, so that mutations mostly
 * yield chains that get past the ring, then bytes to put anywhere in guest memory. */
#include <linux/virtio_ring.h>
#include <linux/virtio_scsi.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "fuzz_input.h"
#include "scsi_cdrom.h"
#include "scsi_disk.h"
#include "virtio_scsi.h"

enum {
    QUEUE_SIZE = 32,
    AVAIL = 0x200,
    USED = 0x400,
    BUFFERS = 0x800,
    RAM = 0x8000,
    IMAGE = 0x10000,
    UNITS = 3,
};

/* --- what Python does ----------------------------------------------------------------------- */

static struct scsi_handoff *handoff;

static void *serve_handoff(void *argument)
{
    static const uint8_t answer[64] = "answer";

    (void)argument;
    for (;;) {
        struct scsi_command *command = scsi_handoff_take(handoff);
        uint8_t list[300];

        if (!command)
            return NULL;
        if (command->cdb[1] & 1)
            scsi_parameters(command, list, command->cdb[4]);
        else if (command->cdb[2] == 0xFF)
            scsi_invalid_parameter(command, 3, 2);
        else
            scsi_answer(command, answer, sizeof(answer), command->cdb[4]);
        scsi_done_elsewhere(command);
    }
}

static void start_handoff(void)
{
    pthread_t thread;

    handoff = scsi_handoff_create();
    if (!handoff || pthread_create(&thread, NULL, serve_handoff, NULL))
        abort();
}

/* --- what a driver does ----------------------------------------------------------------------- */

static const uint8_t addresses[][8] = {
    {1, 0, 0x40, 0}, {1, 0, 0, 5}, {1, 1, 0x41, 0x2C}, {1, 0, 0x40, 1}, {1, 9, 0, 0},
    {1, 0, 0xC1, 1}, {0xC1, 1},    {1, 1, 0, 0},
};

static void put_cdb(struct input *input, uint8_t *cdb)
{
    const struct scsi_opcodes *disk = scsi_disk_opcodes(), *cdrom = scsi_cdrom_opcodes();
    uint32_t index = (uint32_t)take(input, 1) % (disk->count + cdrom->count);
    const struct scsi_opcode *entry =
        index < disk->count ? &disk->table[index] : &cdrom->table[index - disk->count];
    uint8_t how = (uint8_t)take(input, 1);
    uint8_t lba = (uint8_t)take(input, 1), length = (uint8_t)take(input, 1);

    cdb[0] = entry->opcode;
    cdb[1] = how & 0x1F;
    if (entry->service_action != SCSI_NO_SERVICE_ACTION)
        cdb[1] = (uint8_t)entry->service_action;
    if (entry->size == 6) {
        cdb[3] = lba;
        cdb[4] = length;
    } else if (entry->size == 16) {
        cdb[9] = lba;
        cdb[13] = length;
    } else {
        cdb[5] = lba;
        cdb[entry->size == 12 ? 9 : 8] = length;
    }
    if (how & 0x20)
        cdb[2] = (uint8_t)take(input, 1);
    if (how & 0x40) {
        uint64_t any = take(input, 8);

        memcpy(cdb + 2, &any, sizeof(any));
    }
}

/* A command: header, data-out or data-in, response, framed in one of some ways. Returns the number
 * of descriptors taken. */
static unsigned add_chain(struct input *input, uint8_t *ram, unsigned desc_index, uint64_t *buffer,
                          const struct virtio_scsi_sizes *sizes)
{
    struct vring_desc *table = (struct vring_desc *)ram;
    struct virtio_scsi_cmd_req *header = (struct virtio_scsi_cmd_req *)(ram + *buffer);
    unsigned shape = (unsigned)take(input, 1);
    uint32_t lengths[5] = {19 + sizes->cdb_size, 0, 12 + sizes->sense_size, 0, 0};
    unsigned count = 0;

    memcpy(header->lun, addresses[take(input, 1) % 8], 8);
    header->tag = take(input, 1);
    memset(header->cdb, 0, sizes->cdb_size);
    put_cdb(input, header->cdb);
    if (shape & 0x01)
        lengths[1] = (uint32_t)take(input, 1) * (shape & 0x02 ? 64 : 1);
    if (shape & 0x04)
        lengths[3] = (uint32_t)take(input, 1) * (shape & 0x02 ? 64 : 1);
    if (shape & 0x08)
        lengths[4] = (uint32_t)take(input, 1);
    if (shape & 0x10)
        lengths[0] = (uint32_t)take(input, 1);
    if (shape & 0x20)
        lengths[2] = (uint32_t)take(input, 1);
    for (unsigned i = 0; i < 5; i++) {
        if (lengths[i] == 0)
            continue;
        if (i == 1 && (shape & 0x40)) {
            for (unsigned at = 0; at < 64; at++)
                ram[*buffer + at] = (uint8_t)take(input, 1);
        }
        table[desc_index + count] = (struct vring_desc){
            .addr = *buffer,
            .len = lengths[i],
            .flags = (i >= 2 ? VRING_DESC_F_WRITE : 0) | VRING_DESC_F_NEXT,
            .next = (uint16_t)(desc_index + count + 1),
        };
        count++;
        *buffer += 384;
        if (*buffer > RAM - 1024)
            *buffer = BUFFERS;
    }
    if (count > 0)
        table[desc_index + count - 1].flags &= (uint16_t)~VRING_DESC_F_NEXT;
    return count ? count : 1;
}

static void functions(struct virtio_scsi_queue *queue, struct scsi_disk *disks, unsigned which)
{
    struct virtio_scsi_function function = {
        .lun = which & 1 ? &disks[0].lun : NULL,
        .target = which & 2 ? 0 : -1,
        .one = which & 4,
        .tag = which >> 4,
        .end = which & 8 ? SCSI_ABORTED : SCSI_DELIVERED,
        .done_fd = -1,
    };

    virtio_scsi_post(&function, &queue, 1); /* the queue does not run, so it is done */
    if (function.pending)
        abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const struct virtio_scsi_sizes size_choices[] = {{96, 32}, {0, 16}, {252, 260}, {5, 10}};
    static const uint8_t inquiry[96] = "inquiry";
    static const struct scsi_page pages[] = {{SCSI_STANDARD_INQUIRY, 96, inquiry},
                                             {0x80, 20, inquiry}};
    struct input input = {data, size};
    unsigned setup = (unsigned)take(&input, 1);
    const struct virtio_scsi_sizes *sizes = &size_choices[take(&input, 1) % 4];
    const struct virtq_config config = {0, AVAIL, USED, QUEUE_SIZE, setup & 1, setup & 2};
    uint8_t *ram = calloc(1, RAM); /* on the heap, for AddressSanitizer */
    const struct guest_mem memory = {1, {{0, RAM, ram}}};
    struct blk_image image = {
        .fd = memfd_create("fuzz", MFD_CLOEXEC),
        .size = IMAGE,
        .block_size = setup & 4 ? 4096 : 512,
        .buffer_align = setup & 8 ? 512 : 1,
    };
    struct scsi_disk disks[UNITS];
    struct scsi_cdrom cdrom = {0};
    struct virtio_scsi_unit units[UNITS + 1];
    static const uint32_t places[UNITS + 1] = {0, 5, 1 << 16, 1 << 16 | 300};
    const struct virtio_scsi_map map = {UNITS + 1, units};
    struct virtio_irq irq = {.status = &(uint32_t){0}, .irqfd = -1};
    int kick = eventfd(0, EFD_NONBLOCK);
    struct virtio_scsi_queue *queue;
    struct vring_avail *avail = (struct vring_avail *)(ram + AVAIL);
    uint64_t buffer = BUFFERS;
    unsigned desc_index = 0;
    struct stat status;

    if (!handoff)
        start_handoff();
    cdrom.handoff = handoff;
    if (ftruncate(image.fd, IMAGE) < 0 || pwrite(image.fd, "image", 5, 0) != 5)
        abort();
    for (unsigned i = 0; i < UNITS; i++) {
        disks[i] = (struct scsi_disk){
            .image = &image,
            .handoff = handoff,
            .block_size = image.block_size,
            .readonly = setup & 16,
            .default_write_cache = setup & 32,
        };
        if (scsi_disk_init(&disks[i], pages, 2) < 0)
            abort();
        disks[i].lun.abilities = i != 1 ? SCSI_DISK_UNMAP : 0;
        disks[i].lun.descriptor_sense = i == 2;
        if (i == 2)
            scsi_lun_reset(&disks[i].lun, SCSI_ATTENTION_POWER_ON);
    }
    if (scsi_cdrom_init(&cdrom, pages, 2) < 0)
        abort();
    scsi_cdrom_set_medium(&cdrom, setup & 128 ? NULL : &image, false);
    for (unsigned i = 0; i <= UNITS; i++)
        units[i].address = places[i];
    units[0].lun = &disks[0].lun;
    units[1].lun = &disks[1].lun;
    units[2].lun = &cdrom.lun;
    units[3].lun = &disks[2].lun;
    queue = virtio_scsi_queue_create(&map, sizes, BLK_ENGINE_SYNC, &memory, &config, kick, &irq);
    if (!queue)
        abort();
    if (take(&input, 1) & 1)
        functions(queue, disks, (unsigned)take(&input, 1));

    while (input.size > 0 && desc_index + 5 <= QUEUE_SIZE && !(setup & 64)) {
        avail->ring[avail->idx++ % QUEUE_SIZE] = (uint16_t)desc_index;
        desc_index += add_chain(&input, ram, desc_index, &buffer, sizes);
    }
    while (input.size > 0) {
        uint64_t gpa = take(&input, 2) % RAM;

        ram[setup & 64 ? gpa % BUFFERS : gpa] = (uint8_t)take(&input, 1);
    }

    virtio_scsi_queue_stop(queue, true); /* so that it makes one pass */
    if (virtio_scsi_queue_run(queue) < 0)
        abort();
    virtio_scsi_queue_destroy(queue);

    if (fstat(image.fd, &status) < 0 || status.st_size != IMAGE)
        abort();
    if (setup & 16) {
        static uint8_t expected[IMAGE] = "image", contents[IMAGE];

        if (pread(image.fd, contents, IMAGE, 0) != IMAGE ||
            memcmp(contents, expected, IMAGE) != 0)
            abort();
    }
    for (unsigned i = 0; i < UNITS; i++)
        scsi_disk_destroy(&disks[i]);
    scsi_cdrom_destroy(&cdrom);
    close(image.fd);
    close(kick);
    free(ram);
    return 0;
}
