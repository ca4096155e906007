#include "virtio_net.h"

#include <assert.h>
#include <errno.h>
#include <limits.h>
#include <linux/virtio_net.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "net_pcap.h"
#include "worker.h"

#ifndef VIRTIO_NET_HDR_GSO_UDP_L4 /* since Linux 6.2 */
#define VIRTIO_NET_HDR_GSO_UDP_L4 5
#endif

#define HEADER_SIZE 12u /* struct virtio_net_hdr_v1 */
_Static_assert(sizeof(struct virtio_net_hdr_v1) == HEADER_SIZE, "5.1.6");

/* What an event is of; the data of others are the engine's. */
#define EVENT_KICK 0u
#define EVENT_PORT 1u
#define EVENTS_PER_WAIT 16

#define MIN_FRAME 14u
#define MAX_FRAME VIRTIO_NET_MAX_FRAME
/* What is read of a frame at most, header included: one that fills it is too long. */
#define READ_LIMIT (HEADER_SIZE + MAX_FRAME + 1u)

/* One turn of a direction: bounds how long the other one waits, and the driver for what is done. */
#define TX_BATCH 32u
#define RX_BATCH 64u
#define BATCH_BYTES (256u << 10)

/* Room that a frame is expected to need at first, and how many frames a guess is kept for. */
#define USUAL_FRAME (HEADER_SIZE + 18u + 1500u)
#define GUESS_FRAMES 64u

/* A receive buffer that was taken from the ring and not yet returned: its next `iov_count` entries
 * of struct rx's vector. */
struct buffer {
    uint16_t head;
    uint16_t iov_count;
    uint32_t bytes;
};

/* The receiving side. Buffers are taken before it is known how long the next frame is, and those
 * that it leaves stay in stock for the one after it. A frame that comes out longer than the
 * buffers it was offered is continued in `spill`, and copied from there into more of them.
 *
 * Positions in a frame count from its virtio_net_hdr_v1. */
struct rx {
    struct virtq_side side;

    struct buffer *buffers; /* [first_buffer, end_buffer) are in stock */
    struct iovec *iov;      /* [first_iov, end_iov) are theirs */
    uint32_t capacity;      /* of either array */
    uint32_t first_buffer, end_buffer;
    uint32_t first_iov, end_iov;
    uint64_t stock_bytes;

    uint32_t expected; /* bytes of buffers to offer the next frame */
    uint32_t largest;  /* of the frames since the guess was last looked at */
    uint32_t seen;     /* how many these are */

    uint32_t total; /* size of the frame at hand, 0 if there is none */
    uint32_t got;   /* position up to which it has been received */
    uint32_t room;  /* bytes of the buffers that it was offered; from there on it is in spill */
    uint8_t spill[READ_LIMIT];

    struct iovec scratch[2 * VIRTIO_NET_MAX_QUEUE_SIZE + 2];
};

/* A frame of the driver that waits for the port. */
struct tx_frame {
    struct {
        uint8_t length[4]; /* NET_FRAMING_STREAM */
        struct virtio_net_hdr_v1 header;
    } prefix;
    uint16_t head;
    uint16_t iov_count;
    uint32_t iov; /* index of its first entry; that is for the prefix */
    uint32_t frame_bytes;
    uint32_t left; /* bytes that the port has not taken, with the prefix */
    bool begun;    /* it has taken others */
};

struct tx {
    struct virtq_side side;
    struct tx_frame frames[TX_BATCH];
    uint32_t next, count; /* [next, count) wait */
    struct iovec *iov;
    uint32_t capacity, used; /* of iov */
};

struct virtio_net_pair {
    struct virtio_net_device *device;
    struct virtio_net_stream *stream;
    struct virtio_irq *irq;
    int fd;
    int epoll_fd;
    bool stopping; /* atomic */
    bool gone;     /* the port's peer */
    bool told;     /* virtio_net_pair_run has returned VIRTIO_NET_GONE */
    bool readable; /* no read has said EAGAIN since the port last had something */
    bool blocked;  /* a write has, and EPOLLOUT is awaited */
    struct virtio_net_counters counters;
    struct rx rx;
    struct tx tx;
};

/* --- both directions ---------------------------------------------------------------------- */

/* Counters have one writer, and readers that only look. */
static void add(uint64_t *counter, uint64_t count)
{
    __atomic_store_n(counter, *counter + count, __ATOMIC_RELAXED);
}

/* Copies `size` bytes from position `offset` of the buffers on; those there are. */
static uint32_t copy_out(const struct iovec *iov, uint32_t count, uint32_t offset, void *to,
                         uint32_t size)
{
    uint8_t *out = to;
    uint32_t done = 0;

    for (uint32_t i = 0; i < count && done < size; i++) {
        uint32_t length = (uint32_t)iov[i].iov_len;

        if (offset >= length) {
            offset -= length;
            continue;
        }
        length -= offset;
        if (length > size - done)
            length = size - done;
        memcpy(out + done, (const uint8_t *)iov[i].iov_base + offset, length);
        done += length;
        offset = 0;
    }
    return done;
}

static void copy_in(const struct iovec *iov, uint32_t offset, const void *from, uint32_t size)
{
    const uint8_t *in = from;

    for (; size > 0; iov++) {
        uint32_t length = (uint32_t)iov->iov_len;

        if (offset >= length) {
            offset -= length;
            continue;
        }
        length -= offset;
        if (length > size)
            length = size;
        memcpy((uint8_t *)iov->iov_base + offset, in, length);
        in += length;
        size -= length;
        offset = 0;
    }
}

/* Whether a frame of `frame_bytes` may have this header where `offloads` are allowed (5.1.6.2,
 * 5.1.6.4). What a receiver would ignore is cleared. */
static bool check_header(struct virtio_net_hdr_v1 *header, uint32_t offloads,
                         uint32_t frame_bytes)
{
    uint8_t gso = header->gso_type & (uint8_t)~VIRTIO_NET_HDR_GSO_ECN;
    uint32_t needed = 0;

    header->flags &= VIRTIO_NET_HDR_F_NEEDS_CSUM | VIRTIO_NET_HDR_F_DATA_VALID;
    if (header->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM) {
        if ((uint32_t)header->csum_start + header->csum_offset + 2 > frame_bytes)
            return false;
        needed = NET_OFFLOAD_CSUM;
    } else if (gso != VIRTIO_NET_HDR_GSO_NONE) {
        return false; /* the pieces will need checksums */
    } else {
        header->csum_start = header->csum_offset = 0;
    }
    if (!(offloads & NET_OFFLOAD_CSUM))
        header->flags &= (uint8_t)~VIRTIO_NET_HDR_F_DATA_VALID;

    if (gso == VIRTIO_NET_HDR_GSO_NONE) {
        header->gso_type = VIRTIO_NET_HDR_GSO_NONE;
        header->gso_size = header->hdr_len = 0;
        return (needed & ~offloads) == 0;
    }
    switch (gso) {
    case VIRTIO_NET_HDR_GSO_TCPV4:
        needed |= NET_OFFLOAD_TSO4;
        break;
    case VIRTIO_NET_HDR_GSO_TCPV6:
        needed |= NET_OFFLOAD_TSO6;
        break;
    case VIRTIO_NET_HDR_GSO_UDP:
        needed |= NET_OFFLOAD_UFO;
        break;
    case VIRTIO_NET_HDR_GSO_UDP_L4: /* the frame itself tells IPv4 from IPv6 */
        needed |= offloads & NET_OFFLOAD_USO4 ? NET_OFFLOAD_USO4 : NET_OFFLOAD_USO6;
        break;
    default:
        return false;
    }
    if (header->gso_type & VIRTIO_NET_HDR_GSO_ECN)
        needed |= NET_OFFLOAD_ECN;
    if (header->hdr_len > frame_bytes)
        header->hdr_len = 0; /* it is a hint */
    return header->gso_size != 0 && (needed & ~offloads) == 0;
}

static void record(struct virtio_net_pair *pair, bool outbound, const struct iovec *iov,
                   uint32_t count)
{
    int fd = __atomic_load_n(&pair->device->pcap_fd, __ATOMIC_RELAXED);

    if (fd >= 0 && net_pcap_write(fd, outbound, iov, count) < 0)
        __atomic_store_n(&pair->device->pcap_fd, -1, __ATOMIC_RELAXED); /* the disk is full */
}

static bool link_up(const struct virtio_net_pair *pair)
{
    return __atomic_load_n(&pair->device->link_up, __ATOMIC_RELAXED);
}

/* Whether the errno of a read or write says that the port is of no use any more, rather than
 * that this frame was not to its liking. */
static bool is_gone(int error)
{
    return error == EPIPE || error == ECONNRESET || error == ENOTCONN || error == ECONNREFUSED ||
           error == EBADFD || error == EBADF || error == ENODEV || error == ENXIO;
}

/* --- receiving: the stock ------------------------------------------------------------------ */

static uint32_t stock_count(const struct rx *rx)
{
    return rx->end_buffer - rx->first_buffer;
}

/* Moves the stock to the front of its arrays. */
static void compact(struct rx *rx)
{
    memmove(rx->buffers, rx->buffers + rx->first_buffer, stock_count(rx) * sizeof(*rx->buffers));
    rx->end_buffer -= rx->first_buffer;
    rx->first_buffer = 0;
    memmove(rx->iov, rx->iov + rx->first_iov,
            (rx->end_iov - rx->first_iov) * sizeof(*rx->iov));
    rx->end_iov -= rx->first_iov;
    rx->first_iov = 0;
}

/* Takes one more buffer. False when the driver has none, or none more is kept. */
static bool take_buffer(struct rx *rx, bool needed)
{
    for (;;) {
        struct virtq_chain chain;

        if (rx->capacity - rx->end_iov < rx->side.vq.size) {
            if (rx->capacity - (rx->end_iov - rx->first_iov) < rx->side.vq.size)
                return false;
            compact(rx);
        }
        chain.iov = &rx->iov[rx->end_iov];
        if (virtq_side_pop(&rx->side, &chain, needed) != VIRTQ_CHAIN)
            return false;
        if (chain.writable_bytes < HEADER_SIZE) { /* 5.1.6.3.1 */
            virtq_push(&rx->side.vq, chain.head, 0);
            continue;
        }
        if (chain.readable > 0)
            memmove(chain.iov, chain.iov + chain.readable, chain.writable * sizeof(*chain.iov));
        rx->buffers[rx->end_buffer++] =
            (struct buffer){chain.head, chain.writable, chain.writable_bytes};
        rx->end_iov += chain.writable;
        rx->stock_bytes += chain.writable_bytes;
        return true;
    }
}

/* Takes buffers until there are `bytes` of them in stock. False when there are fewer; the driver
 * then notifies of more if these are `needed`. */
static bool fill_stock(struct rx *rx, uint32_t bytes, bool needed)
{
    while (rx->stock_bytes < bytes) {
        if (!take_buffer(rx, needed))
            return false;
    }
    return true;
}

/* No more buffers can come: all that the queue can have are here. */
static bool stock_is_all(const struct rx *rx)
{
    return (uint16_t)(rx->side.vq.next_avail - rx->side.vq.next_used) == rx->side.vq.size ||
           rx->capacity - (rx->end_iov - rx->first_iov) < rx->side.vq.size;
}

/* Returns the first buffer with `written` bytes. */
static void return_buffer(struct rx *rx, uint32_t written)
{
    struct buffer *buffer = &rx->buffers[rx->first_buffer];

    virtq_push(&rx->side.vq, buffer->head, written);
    rx->stock_bytes -= buffer->bytes;
    rx->first_iov += buffer->iov_count;
    if (++rx->first_buffer == rx->end_buffer)
        rx->first_buffer = rx->end_buffer = rx->first_iov = rx->end_iov = 0;
}

/* Chooses the buffers that the next frame is offered: the first, or as many as make up `bytes`
 * where they can be merged. There must be one. */
static void offer(struct virtio_net_pair *pair, uint32_t bytes)
{
    struct rx *rx = &pair->rx;
    uint32_t limit = pair->device->mergeable ? rx->end_buffer : rx->first_buffer + 1;
    uint32_t entries = 0;
    uint64_t room = 0;

    for (uint32_t i = rx->first_buffer; i < limit && room < bytes; i++) {
        entries += rx->buffers[i].iov_count;
        if (entries > VIRTIO_NET_MAX_QUEUE_SIZE)
            break;
        room += rx->buffers[i].bytes;
    }
    rx->room = room < READ_LIMIT ? (uint32_t)room : READ_LIMIT;
}

/* Puts the vector of the positions [from, to) of the frame at hand, with the spill where it leaves
 * its buffers, into scratch, and returns its length. */
static uint32_t map(struct rx *rx, uint32_t from, uint32_t to)
{
    uint32_t count = 0, at = 0;
    uint32_t end = to < rx->room ? to : rx->room;

    for (uint32_t i = rx->first_iov; at < end; i++) {
        struct iovec part = rx->iov[i];
        uint32_t next = at + (uint32_t)part.iov_len;

        if (next > end) {
            part.iov_len -= next - end;
            next = end;
        }
        if (next > from) {
            if (at < from) {
                part.iov_base = (uint8_t *)part.iov_base + (from - at);
                part.iov_len -= from - at;
            }
            rx->scratch[count++] = part;
        }
        at = next;
    }
    if (to > rx->room) {
        uint32_t start = from > rx->room ? from - rx->room : 0;

        rx->scratch[count++] = (struct iovec){rx->spill + start, to - rx->room - start};
    }
    return count;
}

/* --- receiving: frames --------------------------------------------------------------------- */

enum rx_result {
    RX_FRAME,   /* one more, delivered or dropped */
    RX_NOTHING, /* the port has none, or the driver has no buffers for it */
};

/* Adapts the room that frames are offered to their sizes. */
static void learn(struct rx *rx, uint32_t total)
{
    if (total > rx->largest)
        rx->largest = total;
    if (total > rx->expected)
        rx->expected = READ_LIMIT;
    if (++rx->seen == GUESS_FRAMES) {
        rx->expected = rx->largest > USUAL_FRAME ? READ_LIMIT : USUAL_FRAME;
        rx->largest = rx->seen = 0;
    }
}

static void forget_frame(struct rx *rx)
{
    rx->total = rx->got = rx->room = 0;
}

static void drop_frame(struct virtio_net_pair *pair, uint64_t *counter)
{
    add(counter, 1);
    forget_frame(&pair->rx);
}

/* Puts the rest of the frame at hand, which is in the spill, into more buffers. False while the
 * driver has none. */
static bool place_spill(struct virtio_net_pair *pair)
{
    struct rx *rx = &pair->rx;

    if (!pair->device->mergeable) {
        drop_frame(pair, &pair->counters.rx_dropped);
        return true;
    }
    if (!fill_stock(rx, rx->total, true)) {
        if (stock_is_all(rx))
            drop_frame(pair, &pair->counters.rx_dropped);
        return rx->total == 0;
    }
    copy_in(&rx->iov[rx->first_iov], rx->room, rx->spill, rx->total - rx->room);
    rx->room = rx->total;
    add(&pair->counters.rx_spilled, 1);
    return true;
}

/* Gives the frame at hand, whose `header` is checked, to the driver. */
static void deliver(struct virtio_net_pair *pair, struct virtio_net_hdr_v1 *header)
{
    struct rx *rx = &pair->rx;
    uint32_t left = rx->total;
    uint32_t buffers = 0;
    uint64_t bytes = 0;

    while (bytes < rx->total)
        bytes += rx->buffers[rx->first_buffer + buffers++].bytes;
    header->num_buffers = (uint16_t)buffers;
    copy_in(&rx->iov[rx->first_iov], 0, header, HEADER_SIZE);
    if (pair->device->pcap_fd >= 0)
        record(pair, false, rx->scratch, map(rx, HEADER_SIZE, rx->total));
    add(&pair->counters.rx_frames, 1);
    add(&pair->counters.rx_bytes, rx->total - HEADER_SIZE);
    while (buffers-- > 0) {
        uint32_t size = rx->buffers[rx->first_buffer].bytes;
        uint32_t written = left < size ? left : size;

        left -= written;
        return_buffer(rx, written);
    }
    forget_frame(rx);
}

/* The frame at hand is here: what becomes of it. */
static enum rx_result finish_frame(struct virtio_net_pair *pair)
{
    struct virtio_net_device *device = pair->device;
    struct rx *rx = &pair->rx;
    struct {
        struct virtio_net_hdr_v1 header;
        uint8_t frame[NET_FILTER_LOOK];
    } look = {0};
    uint32_t from = device->vnet_hdr ? 0 : HEADER_SIZE;
    uint32_t size;

    if (rx->total < HEADER_SIZE + MIN_FRAME || rx->total == READ_LIMIT) {
        drop_frame(pair, &pair->counters.rx_dropped);
        return RX_FRAME;
    }
    size = rx->total < sizeof(look) ? rx->total : sizeof(look);
    copy_out(rx->scratch, map(rx, from, size), 0, (uint8_t *)&look + from, size - from);
    if (!link_up(pair) || !net_filter_accepts(&device->filter, look.frame, size - HEADER_SIZE)) {
        drop_frame(pair, &pair->counters.rx_filtered);
        return RX_FRAME;
    }
    if (!check_header(&look.header, __atomic_load_n(&device->rx_offloads, __ATOMIC_RELAXED),
                      rx->total - HEADER_SIZE)) {
        drop_frame(pair, &pair->counters.rx_dropped);
        return RX_FRAME;
    }
    if (rx->total > rx->room && !place_spill(pair))
        return RX_NOTHING;
    if (rx->total > 0)
        deliver(pair, &look.header);
    return RX_FRAME;
}

/* Reads from the port into the first `count` entries of scratch: bytes, 0 when there are none. */
static ssize_t read_port(struct virtio_net_pair *pair, uint32_t count)
{
    struct msghdr message = {.msg_iov = pair->rx.scratch, .msg_iovlen = count};
    ssize_t result;

    do {
        if (pair->device->framing == NET_FRAMING_TAP)
            result = readv(pair->fd, pair->rx.scratch, (int)count);
        else
            result = recvmsg(pair->fd, &message, MSG_DONTWAIT);
    } while (result < 0 && errno == EINTR);
    if (result > 0)
        return result;
    if (result == 0 || is_gone(errno))
        pair->gone = true;
    pair->readable = false;
    return 0;
}

/* One frame a read. Without a link, frames are read all the same, and dropped: they would be old
 * news when it is back. */
static enum rx_result receive_message(struct virtio_net_pair *pair)
{
    struct rx *rx = &pair->rx;
    uint32_t skip = pair->device->vnet_hdr ? 0 : HEADER_SIZE;
    uint32_t expected = link_up(pair) ? rx->expected : 0;
    ssize_t size;

    if (expected > 0) {
        if (!fill_stock(rx, 1, true))
            return RX_NOTHING;
        if (pair->device->mergeable)
            fill_stock(rx, expected, false);
        offer(pair, expected);
    }
    size = read_port(pair, map(rx, skip, READ_LIMIT));
    if (size == 0) {
        forget_frame(rx);
        return RX_NOTHING;
    }
    rx->total = rx->got = skip + (uint32_t)size;
    learn(rx, rx->total);
    return finish_frame(pair);
}

/* Begins the frame of which the length has been read. False when that is nonsense. */
static bool begin_frame(struct virtio_net_pair *pair)
{
    const uint8_t *prefix = pair->stream->prefix;
    uint32_t length = (uint32_t)prefix[0] << 24 | (uint32_t)prefix[1] << 16 |
                      (uint32_t)prefix[2] << 8 | prefix[3];

    if (length == 0 || length > MAX_FRAME)
        return false;
    pair->rx.got = pair->device->vnet_hdr ? 0 : HEADER_SIZE;
    pair->rx.total = pair->rx.got + length;
    pair->stream->prefix_got = 0;
    return true;
}

/* The next part of a length, of the frame after it, and of the length that follows. */
static enum rx_result receive_stream(struct virtio_net_pair *pair)
{
    struct virtio_net_stream *stream = pair->stream;
    struct rx *rx = &pair->rx;
    uint32_t count = 0, missing;
    ssize_t size;

    if (rx->total == 0 && stream->prefix_got == sizeof(stream->prefix) && !begin_frame(pair)) {
        pair->gone = true; /* where would the next one begin? */
        return RX_NOTHING;
    }
    if (rx->total > 0 && rx->got == rx->total)
        return finish_frame(pair); /* it waited for buffers */
    if (rx->total > 0 && rx->got <= HEADER_SIZE && rx->room == 0 && link_up(pair)) {
        if (!fill_stock(rx, pair->device->mergeable ? rx->total : 1, true) && !stock_is_all(rx))
            return RX_NOTHING;
        offer(pair, rx->total);
    }
    if (stream->skip > 0) { /* there is no frame at hand then */
        missing = stream->skip;
        rx->scratch[count++] = (struct iovec){rx->spill, missing};
    } else {
        missing = rx->total - rx->got;
        count = rx->total > 0 ? map(rx, rx->got, rx->total) : 0;
    }
    rx->scratch[count++] = (struct iovec){stream->prefix + stream->prefix_got,
                                          sizeof(stream->prefix) - stream->prefix_got};
    size = read_port(pair, count);
    if (size == 0)
        return RX_NOTHING;
    if ((uint32_t)size > missing)
        stream->prefix_got += (uint32_t)size - missing;
    else
        missing = (uint32_t)size;
    if (stream->skip > 0) {
        stream->skip -= missing;
        return RX_FRAME;
    }
    rx->got += missing;
    return rx->total > 0 && rx->got == rx->total ? finish_frame(pair) : RX_FRAME;
}

/* Leaves the stream to the pair that follows. */
static void leave_stream(struct virtio_net_pair *pair)
{
    struct virtio_net_stream *stream = pair->stream;
    const struct tx *tx = &pair->tx;

    if (pair->rx.total > 0)
        stream->skip = pair->rx.total - pair->rx.got;
    if (tx->next < tx->count && tx->frames[tx->next].begun) {
        const struct tx_frame *frame = &tx->frames[tx->next];

        stream->unsent_from = 0;
        stream->unsent_to = copy_out(&tx->iov[frame->iov], frame->iov_count, 0, stream->unsent,
                                     frame->left);
    }
}

/* A frame of the engine, for which the buffers are taken when its size is known: net_deliver. */
static bool deliver_frame(void *opaque, const void *frame, size_t size)
{
    struct virtio_net_pair *pair = opaque;
    struct virtio_net_device *device = pair->device;
    struct rx *rx = &pair->rx;
    struct virtio_net_hdr_v1 header = {.flags = VIRTIO_NET_HDR_F_DATA_VALID};
    uint32_t total = HEADER_SIZE + (uint32_t)size;

    if (!link_up(pair) || !net_filter_accepts(&device->filter, frame, (uint32_t)size)) {
        add(&pair->counters.rx_filtered, 1);
        return true;
    }
    if (!fill_stock(rx, device->mergeable ? total : 1, true) && !stock_is_all(rx))
        return false;
    offer(pair, total);
    if (rx->room < total) {
        drop_frame(pair, &pair->counters.rx_dropped);
        return true;
    }
    check_header(&header, __atomic_load_n(&device->rx_offloads, __ATOMIC_RELAXED), (uint32_t)size);
    rx->total = total;
    copy_in(&rx->iov[rx->first_iov], HEADER_SIZE, frame, (uint32_t)size);
    deliver(pair, &header);
    return true;
}

/* True when there may be more. */
static bool serve_rx(struct virtio_net_pair *pair)
{
    struct virtio_net_counters *counters = &pair->counters;
    uint64_t bytes = counters->rx_bytes;
    struct rx *rx = &pair->rx;

    for (unsigned i = 0; i < RX_BATCH && counters->rx_bytes - bytes < BATCH_BYTES; i++) {
        enum rx_result result;

        if (pair->gone || rx->side.vq.broken)
            return false;
        if (pair->device->framing == NET_FRAMING_STREAM) {
            if (!pair->readable && (rx->total == 0 || rx->got < rx->total))
                return false;
            result = receive_stream(pair);
        } else if (rx->total > 0) {
            result = finish_frame(pair);
        } else if (pair->readable) {
            result = receive_message(pair);
        } else {
            return false;
        }
        if (result == RX_NOTHING)
            return false;
    }
    return true;
}

/* --- transmitting -------------------------------------------------------------------------- */

static void return_frame(struct virtio_net_pair *pair, uint16_t head)
{
    virtq_push(&pair->tx.side.vq, head, 0);
}

/* The first frame that waits is through, or will not go (`error`). */
static void frame_done(struct virtio_net_pair *pair, bool error)
{
    struct tx *tx = &pair->tx;
    struct tx_frame *frame = &tx->frames[tx->next++];

    return_frame(pair, frame->head);
    if (error) {
        add(&pair->counters.tx_dropped, 1);
    } else {
        add(&pair->counters.tx_frames, 1);
        add(&pair->counters.tx_bytes, frame->frame_bytes);
    }
}

/* After a write that failed. False when the rest has to wait. */
static bool write_failed(struct virtio_net_pair *pair)
{
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLET, .data.u64 = EVENT_PORT};

    if (errno == EINTR)
        return true;
    if (errno == EAGAIN) {
        add(&pair->counters.tx_waits, 1);
        pair->blocked = true;
        epoll_ctl(pair->epoll_fd, EPOLL_CTL_MOD, pair->fd, &event);
        return false;
    }
    pair->gone = is_gone(errno);
    frame_done(pair, true);
    return true;
}

static bool write_frame(struct virtio_net_pair *pair)
{
    struct tx *tx = &pair->tx;
    struct tx_frame *frame = &tx->frames[tx->next];

    if (writev(pair->fd, &tx->iov[frame->iov], frame->iov_count) < 0)
        return write_failed(pair);
    frame_done(pair, false);
    return true;
}

static bool send_messages(struct virtio_net_pair *pair)
{
    struct tx *tx = &pair->tx;
    struct mmsghdr messages[TX_BATCH];
    unsigned count = 0;
    int sent;

    for (uint32_t i = tx->next; i < tx->count; i++) {
        struct tx_frame *frame = &tx->frames[i];

        messages[count++].msg_hdr = (struct msghdr){.msg_iov = &tx->iov[frame->iov],
                                                    .msg_iovlen = frame->iov_count};
    }
    sent = sendmmsg(pair->fd, messages, count, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent <= 0)
        return write_failed(pair);
    while (sent-- > 0)
        frame_done(pair, false);
    return true;
}

/* Writes to the stream: the bytes that it took, or -1 where `go_on` tells what follows. */
static ssize_t write_stream(struct virtio_net_pair *pair, struct iovec *iov, size_t count,
                            bool *go_on)
{
    struct msghdr message = {.msg_iov = iov, .msg_iovlen = count < IOV_MAX ? count : IOV_MAX};
    ssize_t sent = sendmsg(pair->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);

    if (sent < 0) {
        if (errno != EAGAIN && errno != EINTR)
            pair->gone = true; /* half a frame may be out */
        *go_on = pair->gone || write_failed(pair);
    }
    return sent;
}

static bool send_stream(struct virtio_net_pair *pair)
{
    struct virtio_net_stream *stream = pair->stream;
    struct tx *tx = &pair->tx;
    bool go_on = true;
    ssize_t sent;

    if (stream->unsent_from < stream->unsent_to) {
        struct iovec rest = {stream->unsent + stream->unsent_from,
                             stream->unsent_to - stream->unsent_from};

        sent = write_stream(pair, &rest, 1, &go_on);
        if (sent > 0)
            stream->unsent_from += (uint32_t)sent;
        return go_on;
    }
    /* Frames lie in the vector one after the other. */
    sent = write_stream(pair, &tx->iov[tx->frames[tx->next].iov],
                        tx->used - tx->frames[tx->next].iov, &go_on);
    if (sent < 0)
        return go_on;
    while (tx->next < tx->count && (size_t)sent >= tx->frames[tx->next].left) {
        sent -= tx->frames[tx->next].left;
        frame_done(pair, false);
    }
    if (tx->next < tx->count) {
        struct tx_frame *frame = &tx->frames[tx->next];
        struct iovec *iov = &tx->iov[frame->iov];

        frame->left -= (uint32_t)sent;
        frame->begun |= sent > 0;
        for (; (size_t)sent >= iov->iov_len; iov++)
            sent -= (ssize_t)iov->iov_len;
        iov->iov_base = (uint8_t *)iov->iov_base + sent;
        iov->iov_len -= (size_t)sent;
        frame->iov_count -= (uint16_t)(iov - &tx->iov[frame->iov]);
        frame->iov = (uint32_t)(iov - tx->iov);
    }
    return true;
}

static bool hand_over(struct virtio_net_pair *pair)
{
    struct tx *tx = &pair->tx;
    struct tx_frame *frame = &tx->frames[tx->next];
    struct net_engine *engine = pair->device->engine;

    if (!engine->take(engine, &tx->iov[frame->iov + 1], frame->iov_count - 1u,
                      frame->frame_bytes)) {
        add(&pair->counters.tx_waits, 1);
        return false;
    }
    frame_done(pair, false);
    return true;
}

/* Hands the waiting frames to the port. False when it is full. */
static bool flush(struct virtio_net_pair *pair)
{
    struct tx *tx = &pair->tx;

    while (tx->next < tx->count) {
        bool go_on;

        if (pair->gone) {
            frame_done(pair, true);
            continue;
        }
        if (pair->blocked)
            return false;
        if (pair->device->framing == NET_FRAMING_TAP)
            go_on = write_frame(pair);
        else if (pair->device->framing == NET_FRAMING_PACKET)
            go_on = send_messages(pair);
        else if (pair->device->framing == NET_FRAMING_CALLS)
            go_on = hand_over(pair);
        else
            go_on = send_stream(pair);
        if (!go_on)
            return false;
    }
    tx->next = tx->count = tx->used = 0;
    return true;
}

/* Puts the frame in `chain`, whose vector begins one entry after `used`, into the batch, unless it
 * is one that cannot be sent. */
static void add_frame(struct virtio_net_pair *pair, const struct virtq_chain *chain)
{
    struct virtio_net_device *device = pair->device;
    struct tx *tx = &pair->tx;
    struct tx_frame *frame = &tx->frames[tx->count];
    struct iovec *prefix = &tx->iov[tx->used];
    uint32_t bytes = chain->readable_bytes - HEADER_SIZE;
    uint32_t left = HEADER_SIZE;

    if (chain->readable_bytes < HEADER_SIZE + MIN_FRAME || bytes > MAX_FRAME ||
        !link_up(pair) || pair->gone)
        goto drop;
    copy_out(chain->iov, chain->readable, 0, &frame->prefix.header, HEADER_SIZE);
    if (!check_header(&frame->prefix.header, device->tx_offloads, bytes))
        goto drop;
    frame->prefix.header.flags &= VIRTIO_NET_HDR_F_NEEDS_CSUM;
    frame->prefix.header.num_buffers = 0;
    for (struct iovec *iov = chain->iov; left > 0; iov++) {
        uint32_t part = iov->iov_len < left ? (uint32_t)iov->iov_len : left;

        iov->iov_base = (uint8_t *)iov->iov_base + part;
        iov->iov_len -= part;
        left -= part;
    }
    if (device->pcap_fd >= 0)
        record(pair, true, chain->iov, chain->readable);

    *prefix = (struct iovec){&frame->prefix.header, device->vnet_hdr ? HEADER_SIZE : 0};
    if (device->framing == NET_FRAMING_STREAM) {
        uint32_t length = (uint32_t)prefix->iov_len + bytes;

        frame->prefix.length[0] = (uint8_t)(length >> 24);
        frame->prefix.length[1] = (uint8_t)(length >> 16);
        frame->prefix.length[2] = (uint8_t)(length >> 8);
        frame->prefix.length[3] = (uint8_t)length;
        prefix->iov_base = &frame->prefix;
        prefix->iov_len += sizeof(frame->prefix.length);
    }
    frame->head = chain->head;
    frame->iov = tx->used;
    frame->iov_count = chain->readable + 1;
    frame->frame_bytes = bytes;
    frame->left = (uint32_t)prefix->iov_len + bytes;
    frame->begun = false;
    tx->used += frame->iov_count;
    tx->count++;
    return;

drop:
    add(&pair->counters.tx_dropped, 1);
    return_frame(pair, chain->head);
}

/* True when there may be more. */
static bool serve_tx(struct virtio_net_pair *pair)
{
    struct tx *tx = &pair->tx;
    uint32_t bytes = 0;

    if (!flush(pair))
        return false;
    for (unsigned i = 0; i < TX_BATCH && bytes < BATCH_BYTES; i++) {
        struct virtq_chain chain;

        if (tx->capacity - tx->used < tx->side.vq.size + 1u)
            break;
        chain.iov = &tx->iov[tx->used + 1];
        if (virtq_side_pop(&tx->side, &chain, true) != VIRTQ_CHAIN) {
            flush(pair);
            return false;
        }
        bytes += chain.readable_bytes;
        add_frame(pair, &chain);
    }
    return flush(pair);
}

/* --- the loop ------------------------------------------------------------------------------ */

static void publish(struct virtio_net_pair *pair)
{
    struct virtq *rx = &pair->rx.side.vq, *tx = &pair->tx.side.vq;
    bool wanted = virtq_publish(rx);

    __atomic_store_n(&pair->counters.malformed, rx->malformed + tx->malformed, __ATOMIC_RELAXED);
    if (virtq_publish(tx) || wanted) {
        add(&pair->counters.interrupts, 1);
        virtio_irq_raise(pair->irq, VIRTIO_IRQ_VRING);
    }
}

/* The port has news. */
static void port_ready(struct virtio_net_pair *pair, uint32_t events)
{
    if (events & ~(uint32_t)EPOLLOUT)
        pair->readable = true;
    if (pair->device->framing == NET_FRAMING_TAP && (events & EPOLLERR))
        pair->gone = true; /* the interface was deleted */
    if ((events & EPOLLOUT) && pair->blocked) {
        struct epoll_event event = {.events = EPOLLIN | EPOLLET, .data.u64 = EVENT_PORT};

        pair->blocked = false;
        epoll_ctl(pair->epoll_fd, EPOLL_CTL_MOD, pair->fd, &event);
    }
}

/* Looks for news; with `block`, until there is some. Edges, so that neither notifications have to
 * be read nor a port that has frames for which the driver has no buffers wakes us. */
static int wait_for_news(struct virtio_net_pair *pair, bool block)
{
    struct epoll_event events[EVENTS_PER_WAIT];
    struct net_engine *engine = pair->device->engine;
    int timeout = engine ? engine->prepare(engine) : -1;
    int count = epoll_wait(pair->epoll_fd, events, EVENTS_PER_WAIT, block ? timeout : 0);

    if (count < 0)
        return errno == EINTR ? 0 : -errno;
    for (int i = 0; i < count; i++) {
        if (events[i].data.u64 == EVENT_PORT)
            port_ready(pair, events[i].events);
        else if (events[i].data.u64 != EVENT_KICK)
            engine->ready(engine, (int)(events[i].data.u64 >> 32), events[i].events);
    }
    return 0;
}

static int serve(struct virtio_net_pair *pair)
{
    struct net_engine *engine = pair->device->engine;
    bool more;
    int error;

    do {
        if (engine)
            engine->serve(engine); /* first: it takes nothing before it has got rid of its own */
        more = serve_tx(pair);
        if (!engine)
            more |= serve_rx(pair);
        publish(pair);
        if (pair->rx.side.vq.broken || pair->tx.side.vq.broken)
            return VIRTIO_NET_BROKEN;
        if (pair->gone && !pair->told) {
            pair->told = true;
            return VIRTIO_NET_GONE;
        }
        error = wait_for_news(pair, !more); /* a stop ends it, too */
    } while (!error && !__atomic_load_n(&pair->stopping, __ATOMIC_ACQUIRE));
    return error ? error : VIRTIO_NET_STOPPED;
}

static int watch(struct virtio_net_pair *pair, int fd, uint64_t event_of)
{
    struct epoll_event event = {.events = EPOLLIN | EPOLLET, .data.u64 = event_of};

    return epoll_ctl(pair->epoll_fd, EPOLL_CTL_ADD, fd, &event) < 0 ? -errno : 0;
}

int virtio_net_pair_run(struct virtio_net_pair *pair)
{
    struct net_engine *engine = pair->device->engine;
    int result;

    pair->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (pair->epoll_fd < 0)
        return -errno;
    pair->readable = true;
    pair->blocked = false;
    if (engine)
        engine->attach(engine, pair->epoll_fd, deliver_frame, pair);
    result = watch(pair, pair->rx.side.kick_fd, EVENT_KICK);
    if (!result)
        result = watch(pair, pair->tx.side.kick_fd, EVENT_KICK);
    if (!result && !engine && !pair->gone)
        result = watch(pair, pair->fd, EVENT_PORT);
    if (!result)
        result = serve(pair);
    if (engine)
        engine->detach(engine);
    close(pair->epoll_fd);
    if (result != VIRTIO_NET_GONE) /* else it is run again, or was stopped meanwhile */
        __atomic_store_n(&pair->stopping, false, __ATOMIC_RELAXED);
    return result;
}

void virtio_net_pair_stop(struct virtio_net_pair *pair)
{
    __atomic_store_n(&pair->stopping, true, __ATOMIC_RELEASE);
    eventfd_signal(pair->tx.side.kick_fd);
}

/* --- create and destroy -------------------------------------------------------------------- */

struct virtio_net_pair *virtio_net_pair_create(struct virtio_net_device *device, int fd,
                                               struct virtio_net_stream *stream,
                                               const struct guest_mem *memory,
                                               const struct virtq_config *rx, int rx_kick,
                                               const struct virtq_config *tx, int tx_kick,
                                               struct virtio_irq *irq)
{
    struct virtio_net_pair *pair = calloc(1, sizeof(*pair));
    int error = EINVAL;

    if (!pair)
        return NULL;
    pair->device = device;
    pair->fd = fd;
    pair->stream = stream;
    pair->irq = irq;
    pair->rx.side.kick_fd = rx_kick;
    pair->tx.side.kick_fd = tx_kick;
    pair->rx.expected = USUAL_FRAME;
    if (rx->size > VIRTIO_NET_MAX_QUEUE_SIZE || tx->size > VIRTIO_NET_MAX_QUEUE_SIZE ||
        virtq_init(&pair->rx.side.vq, memory, rx) || virtq_init(&pair->tx.side.vq, memory, tx))
        goto fail;
    virtq_disable_notify(&pair->rx.side.vq);
    virtq_disable_notify(&pair->tx.side.vq);
    /* Either takes a chain of as many entries as its queue is long beside what it has. */
    pair->rx.capacity = 2u * rx->size;
    pair->rx.buffers = malloc(pair->rx.capacity * sizeof(*pair->rx.buffers));
    pair->rx.iov = malloc(pair->rx.capacity * sizeof(*pair->rx.iov));
    pair->tx.capacity = 2u * tx->size + TX_BATCH;
    pair->tx.iov = malloc(pair->tx.capacity * sizeof(*pair->tx.iov));
    error = ENOMEM;
    if (!pair->rx.buffers || !pair->rx.iov || !pair->tx.iov)
        goto fail;
    return pair;

fail:
    virtio_net_pair_destroy(pair);
    errno = error;
    return NULL;
}

void virtio_net_pair_destroy(struct virtio_net_pair *pair)
{
    if (!pair)
        return;
    if (pair->stream)
        leave_stream(pair);
    free(pair->tx.iov);
    free(pair->rx.iov);
    free(pair->rx.buffers);
    free(pair);
}

void virtio_net_set_rx_offloads(struct virtio_net_device *device, uint32_t offloads)
{
    __atomic_store_n(&device->rx_offloads, offloads, __ATOMIC_RELAXED);
}

void virtio_net_set_link(struct virtio_net_device *device, bool up)
{
    __atomic_store_n(&device->link_up, up, __ATOMIC_RELAXED);
}

struct virtio_net_counters virtio_net_pair_counters(const struct virtio_net_pair *pair)
{
    struct virtio_net_counters counters;
    const uint64_t *from = (const uint64_t *)&pair->counters;
    uint64_t *to = (uint64_t *)&counters;

    for (size_t i = 0; i < sizeof(counters) / sizeof(*to); i++)
        to[i] = __atomic_load_n(&from[i], __ATOMIC_RELAXED);
    return counters;
}
