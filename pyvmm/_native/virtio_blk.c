#include "virtio_blk.h"

#include <assert.h>
#include <errno.h>
#include <linux/virtio_blk.h>
#include <stdlib.h>
#include <string.h>

#include "worker.h"

/* How much may be started between two looks at the completions: keeps their latency bounded when
 * the driver has many large requests waiting. */
#define BATCH_BYTES (256u << 10)

/* A request in flight. */
struct slot {
    struct blk_request request;
    struct virtio_blk_queue *queue;
    struct slot *next; /* free or kept */
    bool in_flight;
    uint16_t head;
    uint8_t *status;         /* the status byte, last of the device-writable part */
    uint32_t writable_data;  /* bytes of the device-writable part before it */
    struct blk_range *ranges;
    struct iovec *iov;       /* as many as the queue is long */
};

struct virtio_blk_queue {
    struct virtio_blk_device *device;
    enum blk_engine engine;
    struct virtio_irq *irq;
    bool stopping; /* atomic */
    struct virtq_side side;
    struct blk_io *io;
    struct virtio_blk_counters counters;
    struct slot *free;
    struct slot *kept; /* for the next run, the first to come first */
    struct slot **kept_tail;
    int error; /* of the host, that ends this run; an errno */
    struct slot *slots;
    struct iovec *iov;
};

static bool ending(const struct virtio_blk_queue *queue)
{
    return queue->side.vq.broken || queue->error || __atomic_load_n(&queue->stopping, __ATOMIC_ACQUIRE);
}

/* --- completion --------------------------------------------------------------------------- */

/* Counters have one writer, and readers that only look. */
static void count(uint64_t *counter)
{
    __atomic_store_n(counter, *counter + 1, __ATOMIC_RELAXED);
}

/* Returns the chain with `status`; `filled` bytes of its device-writable part precede it. The used
 * length covers the status byte only where all before it was written, too (2.7.8.2). */
static void complete(struct slot *slot, uint8_t status, uint32_t filled)
{
    struct virtio_blk_queue *queue = slot->queue;

    assert(slot->in_flight); /* exactly once */
    slot->in_flight = false;
    if (slot->status)
        *slot->status = status;
    if (slot->status && filled == slot->writable_data)
        filled++;
    virtq_push(&queue->side.vq, slot->head, filled);
    count(&queue->counters.requests);
    if (status != VIRTIO_BLK_S_OK)
        count(&queue->counters.failed);
    free(slot->ranges);
    slot->ranges = NULL;
    slot->next = queue->free;
    queue->free = slot;
}

static void keep(struct slot *slot)
{
    struct virtio_blk_queue *queue = slot->queue;

    slot->next = NULL;
    *queue->kept_tail = slot;
    queue->kept_tail = &slot->next;
}

static void request_done(struct blk_request *request, int error)
{
    struct slot *slot = (struct slot *)request; /* its first member */
    struct virtio_blk_queue *queue = slot->queue;

    if (error == -ECANCELED && ending(queue)) {
        keep(slot);
        return;
    }
    if (error && error != -EOPNOTSUPP && queue->device->stop_on_error) {
        keep(slot);
        queue->error = -error;
        return;
    }
    if (error == -EOPNOTSUPP)
        complete(slot, VIRTIO_BLK_S_UNSUPP, 0);
    else if (error)
        complete(slot, VIRTIO_BLK_S_IOERR, 0);
    else
        complete(slot, VIRTIO_BLK_S_OK, request->op == BLK_READ ? slot->writable_data : 0);
}

/* --- parsing ------------------------------------------------------------------------------ */

/* A run of buffers. Framing is the driver's choice (2.7.4): any field may be split. */
struct cursor {
    struct iovec *iov;
    uint32_t count;
    uint32_t bytes;
};

/* Copies the next `size` bytes out; the cursor must have as many. */
static void take(struct cursor *cursor, void *to, uint32_t size)
{
    uint8_t *out = to;

    cursor->bytes -= size;
    while (size > 0) {
        struct iovec *iov = cursor->iov;
        uint32_t chunk = iov->iov_len < size ? (uint32_t)iov->iov_len : size;

        memcpy(out, iov->iov_base, chunk);
        out += chunk;
        size -= chunk;
        iov->iov_base = (uint8_t *)iov->iov_base + chunk;
        iov->iov_len -= chunk;
        if (iov->iov_len == 0) {
            cursor->iov++;
            cursor->count--;
        }
    }
}

/* Cuts the last byte off; the cursor must have one. */
static uint8_t *take_last(struct cursor *cursor)
{
    struct iovec *last = &cursor->iov[cursor->count - 1];

    cursor->bytes--;
    if (--last->iov_len == 0)
        cursor->count--;
    return (uint8_t *)last->iov_base + last->iov_len;
}

static bool range_valid(const struct blk_image *image, uint64_t sector, uint64_t bytes)
{
    uint64_t size = __atomic_load_n(&image->size, __ATOMIC_RELAXED);
    uint64_t sectors = size / VIRTIO_BLK_SECTOR;

    if (bytes % image->block_size != 0 || bytes / VIRTIO_BLK_SECTOR > sectors)
        return false;
    return sector <= sectors - bytes / VIRTIO_BLK_SECTOR &&
           sector * VIRTIO_BLK_SECTOR % image->block_size == 0;
}

/* The three ways to start: each hands the slot to the engine, or completes it at once. */

static void start_transfer(struct slot *slot, enum blk_op op, uint64_t sector,
                           const struct cursor *data)
{
    struct virtio_blk_queue *queue = slot->queue;
    struct virtio_blk_device *device = queue->device;

    if ((op == BLK_WRITE && device->readonly) ||
        !range_valid(device->image, sector, data->bytes)) {
        complete(slot, VIRTIO_BLK_S_IOERR, 0);
        return;
    }
    slot->request = (struct blk_request){
        .image = device->image,
        .op = op,
        .stable = op == BLK_WRITE && __atomic_load_n(&device->writethrough, __ATOMIC_RELAXED),
        .offset = sector * VIRTIO_BLK_SECTOR,
        .iov = data->iov,
        .iov_count = data->count,
        .done = request_done,
    };
    blk_io_submit(queue->io, &slot->request);
}

/* The segments of a DISCARD or WRITE_ZEROES: all are checked before the first is executed.
 * VIRTIO_BLK_S_OK or the status that the request ends with. */
static uint8_t read_segments(struct slot *slot, enum blk_op op, struct cursor *data,
                             uint32_t count, uint32_t *flags)
{
    const struct blk_image *image = slot->queue->device->image;
    uint32_t known = op == BLK_WRITE_ZEROES ? VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP : 0;
    uint8_t status = VIRTIO_BLK_S_OK;

    *flags = known; /* what all segments agree on */
    for (uint32_t i = 0; i < count; i++) {
        struct virtio_blk_discard_write_zeroes segment;
        uint64_t bytes;

        take(data, &segment, sizeof(segment));
        if (segment.flags & ~known) /* unknown flags come before all other errors (5.2.6.2) */
            return VIRTIO_BLK_S_UNSUPP;
        *flags &= segment.flags;
        bytes = (uint64_t)segment.num_sectors * VIRTIO_BLK_SECTOR;
        if (segment.num_sectors > VIRTIO_BLK_MAX_SEGMENT_SECTORS ||
            !range_valid(image, segment.sector, bytes))
            status = VIRTIO_BLK_S_IOERR;
        slot->ranges[i] = (struct blk_range){segment.sector * VIRTIO_BLK_SECTOR, bytes};
    }
    return status;
}

static void start_ranges(struct slot *slot, enum blk_op op, struct cursor *data)
{
    struct virtio_blk_queue *queue = slot->queue;
    struct virtio_blk_device *device = queue->device;
    uint32_t segments = data->bytes / sizeof(struct virtio_blk_discard_write_zeroes);
    uint32_t flags;
    uint8_t status = VIRTIO_BLK_S_IOERR;

    if (!device->readonly && segments > 0 && segments <= VIRTIO_BLK_MAX_SEGMENTS &&
        data->bytes % sizeof(struct virtio_blk_discard_write_zeroes) == 0) {
        slot->ranges = malloc(segments * sizeof(*slot->ranges));
        if (slot->ranges)
            status = read_segments(slot, op, data, segments, &flags);
    }
    if (status != VIRTIO_BLK_S_OK) {
        complete(slot, status, 0);
        return;
    }
    slot->request = (struct blk_request){
        .image = device->image,
        .op = op,
        .stable = __atomic_load_n(&device->writethrough, __ATOMIC_RELAXED),
        .may_unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
        .ranges = slot->ranges,
        .range_count = segments,
        .done = request_done,
    };
    blk_io_submit(queue->io, &slot->request);
}

static void start_flush(struct slot *slot)
{
    struct virtio_blk_queue *queue = slot->queue;

    slot->request = (struct blk_request){
        .image = queue->device->image, .op = BLK_FLUSH, .done = request_done};
    blk_io_submit(queue->io, &slot->request);
}

static void answer_id(struct slot *slot, const struct cursor *data)
{
    const uint8_t *serial = slot->queue->device->serial;
    uint32_t filled = 0;

    for (uint32_t i = 0; i < data->count && filled < VIRTIO_BLK_ID_BYTES; i++) {
        uint32_t room = VIRTIO_BLK_ID_BYTES - filled;
        uint32_t chunk = data->iov[i].iov_len < room ? (uint32_t)data->iov[i].iov_len : room;

        memcpy(data->iov[i].iov_base, serial + filled, chunk);
        filled += chunk;
    }
    complete(slot, VIRTIO_BLK_S_OK, filled);
}

/* Starts the request in `chain`, whose vector is the slot's. Returns the bytes to transfer. */
static uint32_t start(struct slot *slot, const struct virtq_chain *chain)
{
    struct cursor readable = {chain->iov, chain->readable, chain->readable_bytes};
    struct cursor writable = {chain->iov + chain->readable, chain->writable,
                              chain->writable_bytes};
    struct virtio_blk_outhdr header;

    slot->head = chain->head;
    slot->in_flight = true;
    slot->status = writable.bytes > 0 ? take_last(&writable) : NULL;
    slot->writable_data = writable.bytes;
    if (!slot->status || readable.bytes < sizeof(header)) {
        complete(slot, VIRTIO_BLK_S_IOERR, 0);
        return 0;
    }
    take(&readable, &header, sizeof(header));

    switch (header.type) {
    case VIRTIO_BLK_T_IN:
        start_transfer(slot, BLK_READ, header.sector, &writable);
        return writable.bytes;
    case VIRTIO_BLK_T_OUT:
        start_transfer(slot, BLK_WRITE, header.sector, &readable);
        return readable.bytes;
    case VIRTIO_BLK_T_FLUSH:
        start_flush(slot);
        break;
    case VIRTIO_BLK_T_GET_ID:
        answer_id(slot, &writable);
        break;
    case VIRTIO_BLK_T_DISCARD:
        start_ranges(slot, BLK_DISCARD, &readable);
        break;
    case VIRTIO_BLK_T_WRITE_ZEROES:
        start_ranges(slot, BLK_WRITE_ZEROES, &readable);
        break;
    default:
        complete(slot, VIRTIO_BLK_S_UNSUPP, 0);
        break;
    }
    return 0;
}

/* --- the loop ----------------------------------------------------------------------------- */

/* Starts what the driver made available. True when there may be more; otherwise the driver was
 * asked to notify of the next chain, a completion comes first, or the ring is broken. */
static bool start_available(struct virtio_blk_queue *queue)
{
    uint64_t bytes = 0;

    while (bytes < BATCH_BYTES) {
        struct slot *slot = queue->free;
        struct virtq_chain chain;

        if (!slot)
            return false;
        chain.iov = slot->iov;
        if (virtq_side_pop(&queue->side, &chain, true) != VIRTQ_CHAIN)
            return false;
        queue->free = slot->next;
        bytes += start(slot, &chain);
    }
    return true;
}

static void publish(struct virtio_blk_queue *queue)
{
    __atomic_store_n(&queue->counters.malformed, queue->side.vq.malformed, __ATOMIC_RELAXED);
    if (virtq_publish(&queue->side.vq)) {
        count(&queue->counters.interrupts);
        virtio_irq_raise(queue->irq, VIRTIO_IRQ_VRING);
    }
}

/* Goes on with what the last run could not end. */
static void start_kept(struct virtio_blk_queue *queue)
{
    struct slot *slot = queue->kept;

    queue->kept = NULL;
    queue->kept_tail = &queue->kept;
    queue->error = 0;
    while (slot) {
        struct slot *next = slot->next;

        blk_io_submit(queue->io, &slot->request); /* which may keep it again */
        slot = next;
    }
}

static int serve(struct virtio_blk_queue *queue)
{
    int error;

    start_kept(queue);
    do {
        bool more = start_available(queue);

        publish(queue);
        error = blk_io_wait(queue->io, !more && !ending(queue)); /* a stop ends it, too */
    } while (!error && !ending(queue));
    blk_io_cancel_held(queue->io);
    while (!error && blk_io_in_flight(queue->io) > 0)
        error = blk_io_wait(queue->io, true);
    publish(queue);
    if (error)
        return error;
    if (queue->side.vq.broken)
        return VIRTIO_BLK_BROKEN;
    return queue->error ? VIRTIO_BLK_FAILED : VIRTIO_BLK_STOPPED;
}

int virtio_blk_queue_run(struct virtio_blk_queue *queue)
{
    int result;

    queue->io = blk_io_create(queue->engine, queue->side.vq.size);
    if (!queue->io)
        return -errno;
    result = blk_io_watch(queue->io, queue->side.kick_fd);
    if (result == 0)
        result = serve(queue);
    blk_io_destroy(queue->io);
    __atomic_store_n(&queue->stopping, false, __ATOMIC_RELAXED);
    return result;
}

void virtio_blk_queue_stop(struct virtio_blk_queue *queue)
{
    __atomic_store_n(&queue->stopping, true, __ATOMIC_RELEASE);
    eventfd_signal(queue->side.kick_fd);
}

void virtio_blk_queue_allow(struct virtio_blk_queue *queue)
{
    __atomic_store_n(&queue->stopping, false, __ATOMIC_RELAXED);
}

void virtio_blk_queue_wake(struct virtio_blk_queue *queue)
{
    eventfd_signal(queue->side.kick_fd);
}

int virtio_blk_queue_error(const struct virtio_blk_queue *queue)
{
    return queue->error;
}

/* --- create and destroy ------------------------------------------------------------------- */

struct virtio_blk_queue *virtio_blk_queue_create(struct virtio_blk_device *device,
                                                 enum blk_engine engine,
                                                 const struct guest_mem *memory,
                                                 const struct virtq_config *config, int kick_fd,
                                                 struct virtio_irq *irq)
{
    struct virtio_blk_queue *queue = calloc(1, sizeof(*queue));
    uint32_t size = config->size;

    if (!queue)
        return NULL;
    queue->device = device;
    queue->engine = engine;
    queue->irq = irq;
    queue->side.kick_fd = kick_fd;
    queue->kept_tail = &queue->kept;
    if (virtq_init(&queue->side.vq, memory, config) < 0) {
        free(queue);
        errno = EINVAL;
        return NULL;
    }
    queue->slots = calloc(size, sizeof(*queue->slots));
    queue->iov = calloc((size_t)size * size, sizeof(*queue->iov)); /* mostly never touched */
    if (!queue->slots || !queue->iov) {
        virtio_blk_queue_destroy(queue);
        errno = ENOMEM;
        return NULL;
    }
    for (uint32_t i = size; i-- > 0;) {
        struct slot *slot = &queue->slots[i];

        slot->queue = queue;
        slot->iov = &queue->iov[(size_t)i * size];
        slot->next = queue->free;
        queue->free = slot;
    }
    return queue;
}

void virtio_blk_queue_destroy(struct virtio_blk_queue *queue)
{
    if (!queue)
        return;
    for (struct slot *slot = queue->kept; slot; slot = slot->next)
        free(slot->ranges);
    free(queue->iov);
    free(queue->slots);
    free(queue);
}

void virtio_blk_set_writethrough(struct virtio_blk_device *device, bool writethrough)
{
    __atomic_store_n(&device->writethrough, writethrough, __ATOMIC_RELAXED);
}

struct virtio_blk_counters virtio_blk_queue_counters(const struct virtio_blk_queue *queue)
{
    const struct virtio_blk_counters *counters = &queue->counters;

    return (struct virtio_blk_counters){
        .requests = __atomic_load_n(&counters->requests, __ATOMIC_RELAXED),
        .failed = __atomic_load_n(&counters->failed, __ATOMIC_RELAXED),
        .interrupts = __atomic_load_n(&counters->interrupts, __ATOMIC_RELAXED),
        .malformed = __atomic_load_n(&counters->malformed, __ATOMIC_RELAXED),
    };
}
