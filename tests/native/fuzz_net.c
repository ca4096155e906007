/* Fuzzes a pair of the network device's queues: any rings, any headers, any frames of the peer.
 * What must hold whatever driver and peer do: no access outside guest memory (AddressSanitizer),
 * each chain returned once (assert), an end to each run, and nothing but proper frames to the peer.
 *
 * The input is a few bytes of set-up, then chains and frames in a compact form, so that mutations
 * mostly yield what gets past the ring, then bytes to put anywhere in guest memory. */
#include <linux/virtio_net.h>
#include <linux/virtio_ring.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "fuzz_input.h"
#include "virtio_net.h"

enum {
    QUEUE_SIZE = 16,
    RINGS = 0x400, /* of each queue */
    AVAIL = 0x100,
    USED = 0x200,
    BUFFERS = 2 * RINGS,
    RAM = 0x8000,
    HEADER = 12,
};

enum {
    SETUP_EVENT_IDX = 1,
    SETUP_INDIRECT = 2,
    SETUP_MERGEABLE = 4,
    SETUP_VNET_HDR = 8,
    SETUP_STREAM = 16,
    SETUP_OFFLOADS = 32,
    SETUP_RAW = 64, /* everything that follows goes into the rings */
    SETUP_FILTER = 128,
    SETUP_ENGINE = 256, /* no socket, but an engine */
};

/* A peer that is called, and keeps what the driver has no buffers for. */
struct engine {
    struct net_engine engine;
    net_deliver deliver;
    void *deliver_to;
    unsigned queued, delivered;
    struct {
        uint32_t size;
        uint8_t frame[1 << 17];
    } queue[8]; /* [delivered, queued) wait */
};

static void engine_attach(struct net_engine *engine, int epoll_fd, net_deliver deliver,
                          void *opaque)
{
    struct engine *self = (struct engine *)engine;

    (void)epoll_fd;
    self->deliver = deliver;
    self->deliver_to = opaque;
}

static void engine_detach(struct net_engine *engine)
{
    ((struct engine *)engine)->deliver = NULL;
}

static bool engine_take(struct net_engine *engine, const struct iovec *iov, uint32_t count,
                        uint32_t bytes)
{
    static uint8_t frame[VIRTIO_NET_MAX_FRAME];
    struct engine *self = (struct engine *)engine;
    uint32_t have = 0;

    if (bytes < 14 || bytes > sizeof(frame))
        abort();
    for (uint32_t i = 0; i < count; i++) {
        if (iov[i].iov_len > bytes - have)
            abort();
        memcpy(frame + have, iov[i].iov_base, iov[i].iov_len);
        have += (uint32_t)iov[i].iov_len;
    }
    if (have != bytes)
        abort();
    if (self->delivered < self->queued)
        return false;
    return (frame[12] & 1) || self->deliver(self->deliver_to, frame, bytes); /* or it comes back */
}

static int engine_prepare(struct net_engine *engine)
{
    (void)engine;
    return -1;
}

static void engine_serve(struct net_engine *engine)
{
    struct engine *self = (struct engine *)engine;

    while (self->delivered < self->queued) {
        unsigned next = self->delivered;

        if (!self->deliver(self->deliver_to, self->queue[next].frame, self->queue[next].size))
            return;
        self->delivered++;
    }
    self->delivered = self->queued = 0;
}

/* A chain of up to four descriptors for the queue whose rings are at `rings`. A transmitted one
 * begins with a virtio_net_hdr_v1 of the input. Returns the descriptors taken. */
static unsigned add_chain(struct input *input, uint8_t *ram, uint64_t rings, unsigned desc_index,
                          uint64_t *buffer, bool writable)
{
    struct vring_desc *table = (struct vring_desc *)(ram + rings);
    unsigned shape = (unsigned)take(input, 1);
    unsigned count = 1 + shape % 4;

    for (unsigned i = 0; i < HEADER && !writable && (shape & 0x40); i++)
        ram[*buffer + i] = (uint8_t)take(input, 1);
    for (unsigned i = 0; i < count; i++) {
        uint32_t length = (uint32_t)take(input, 1);

        if (shape & 0x08)
            length *= 16;
        if (shape & 0x10)
            length += HEADER;
        table[desc_index + i] = (struct vring_desc){
            .addr = *buffer,
            .len = length,
            .flags = (writable ^ !!(shape & 0x80 && i + 1 == count) ? VRING_DESC_F_WRITE : 0) |
                     (i + 1 < count ? VRING_DESC_F_NEXT : 0),
            .next = (uint16_t)(desc_index + i + 1),
        };
        *buffer += length;
        if (*buffer > RAM - 0x1400)
            *buffer = BUFFERS;
    }
    return count;
}

/* A frame of the peer, its first bytes from the input. */
static void send_frame(struct input *input, int peer, struct engine *engine, unsigned setup)
{
    static uint8_t message[(1 << 17) + 4 + HEADER];
    unsigned shape = (unsigned)take(input, 1);
    uint32_t size = (uint32_t)take(input, shape & 1 ? 1 : 2);
    unsigned first = setup & SETUP_STREAM ? 4 : 0;
    uint32_t length = shape & 2 ? (uint32_t)take(input, 4) : size;

    if (shape & 4)
        size *= 2;
    memset(message, 0, first + HEADER + 18);
    for (unsigned i = 0; i < 4 && first > 0; i++)
        message[i] = (uint8_t)(length >> (24 - 8 * i));
    for (unsigned i = 0; i < HEADER + 18 && (shape & 8); i++)
        message[first + i] = (uint8_t)take(input, 1);
    if ((setup & SETUP_ENGINE) && size >= 14 && engine->queued < 8) {
        memcpy(engine->queue[engine->queued].frame, message + first + HEADER, size);
        engine->queue[engine->queued++].size = size;
    } else if (first + size > 0 &&
               send(peer, message, first + size, MSG_DONTWAIT | MSG_NOSIGNAL) < 0) {
        return;
    }
}

/* What the device sent must be what any peer may get. */
static void check_message(const uint8_t *message, ssize_t size, unsigned setup)
{
    struct virtio_net_hdr_v1 header;
    ssize_t frame = size - (setup & SETUP_VNET_HDR ? HEADER : 0);

    if (frame < 14)
        abort();
    if (!(setup & SETUP_VNET_HDR))
        return;
    memcpy(&header, message, HEADER);
    if (header.num_buffers != 0 || header.flags & ~VIRTIO_NET_HDR_F_NEEDS_CSUM)
        abort();
    if (header.flags && header.csum_start + header.csum_offset + 2 > frame)
        abort();
    if (header.gso_type && (header.gso_size == 0 || !header.flags || header.hdr_len > frame))
        abort();
    if ((header.flags || header.gso_type) && !(setup & SETUP_OFFLOADS))
        abort();
}

static void drain(int peer, unsigned setup)
{
    static uint8_t data[1 << 18];
    size_t have = 0, at = 0;
    ssize_t size;

    while ((size = recv(peer, data + have, sizeof(data) - have, MSG_DONTWAIT)) > 0) {
        if (setup & SETUP_STREAM)
            have += (size_t)size;
        else
            check_message(data, size, setup);
    }
    while (have - at >= 4) {
        uint32_t length = (uint32_t)data[at] << 24 | (uint32_t)data[at + 1] << 16 |
                          (uint32_t)data[at + 2] << 8 | data[at + 3];

        if (length > have - at - 4)
            break; /* the rest is in the stream state */
        check_message(data + at + 4, (ssize_t)length, setup);
        at += 4 + length;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct virtio_net_stream stream;
    static struct engine engine = {
        .engine = {
            .attach = engine_attach,
            .detach = engine_detach,
            .take = engine_take,
            .prepare = engine_prepare,
            .serve = engine_serve,
        },
    };
    struct input input = {data, size};
    unsigned setup = (unsigned)take(&input, 2);
    bool event_idx = setup & SETUP_EVENT_IDX, indirect = setup & SETUP_INDIRECT;
    const struct virtq_config rx = {0, AVAIL, USED, QUEUE_SIZE, event_idx, indirect};
    const struct virtq_config tx = {
        RINGS, RINGS + AVAIL, RINGS + USED, QUEUE_SIZE, event_idx, indirect};
    uint8_t *ram = calloc(1, RAM); /* on the heap, for AddressSanitizer */
    const struct guest_mem memory = {1, {{0, RAM, ram}}};
    uint32_t offloads = setup & SETUP_OFFLOADS ? 0x7F : 0;
    struct virtio_net_device device = {
        .framing = setup & SETUP_ENGINE   ? NET_FRAMING_CALLS
                   : setup & SETUP_STREAM ? NET_FRAMING_STREAM
                                          : NET_FRAMING_PACKET,
        .engine = setup & SETUP_ENGINE ? &engine.engine : NULL,
        .vnet_hdr = setup & SETUP_VNET_HDR,
        .mergeable = setup & SETUP_MERGEABLE,
        .tx_offloads = offloads,
        .rx_offloads = offloads,
        .link_up = true,
        .pcap_fd = -1,
    };
    struct virtio_irq irq = {.status = &(uint32_t){0}, .irqfd = -1};
    int kicks[2] = {eventfd(0, EFD_NONBLOCK), eventfd(0, EFD_NONBLOCK)};
    int fds[2];
    struct virtio_net_pair *pair;
    uint64_t buffer = BUFFERS;
    unsigned descs[2] = {0, 0};

    if (socketpair(AF_UNIX, setup & SETUP_STREAM ? SOCK_STREAM : SOCK_SEQPACKET, 0, fds) < 0)
        abort();
    memset(&stream, 0, offsetof(struct virtio_net_stream, unsent));
    engine.queued = engine.delivered = 0;
    net_filter_init(&device.filter, (const uint8_t *)"\x52\x54\0\1\2\3", setup & SETUP_FILTER);
    if (setup & SETUP_FILTER)
        net_filter_set_mode(&device.filter, NET_FILTER_ALLMULTI);
    pair = virtio_net_pair_create(&device, fds[0],
                                  device.framing == NET_FRAMING_STREAM ? &stream : NULL, &memory,
                                  &rx, kicks[0], &tx, kicks[1], &irq);
    if (!pair)
        abort();

    for (unsigned run = 0; run < 3; run++) {
        for (unsigned i = 0; i < 6 && input.size > 0 && !(setup & SETUP_RAW); i++) {
            unsigned what = (unsigned)take(&input, 1) % 3;

            if (what == 2) {
                send_frame(&input, fds[1], &engine, setup);
            } else if (descs[what] + 4 <= QUEUE_SIZE) {
                uint64_t rings = what * RINGS;
                struct vring_avail *avail = (struct vring_avail *)(ram + rings + AVAIL);

                avail->ring[avail->idx++ % QUEUE_SIZE] = (uint16_t)descs[what];
                descs[what] += add_chain(&input, ram, rings, descs[what], &buffer, what == 0);
            }
        }
        if (run == 2 || (setup & SETUP_RAW)) {
            for (unsigned i = 0; i < 64 && input.size > 0; i++) {
                uint64_t gpa = take(&input, 2) % RAM;

                ram[setup & SETUP_RAW ? gpa % BUFFERS : gpa] = (uint8_t)take(&input, 1);
            }
        }
        virtio_net_pair_stop(pair); /* so that it makes one pass */
        if (virtio_net_pair_run(pair) < 0)
            abort();
        drain(fds[1], setup);
    }
    virtio_net_pair_destroy(pair);
    if (stream.prefix_got > 4 || stream.unsent_from > stream.unsent_to)
        abort();

    close(fds[0]);
    close(fds[1]);
    close(kicks[0]);
    close(kicks[1]);
    free(ram);
    return 0;
}
