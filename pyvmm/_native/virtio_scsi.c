#include "virtio_scsi.h"

#include <assert.h>
#include <errno.h>
#include <linux/virtio_scsi.h>
#include <poll.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "worker.h"

/* How much may be started between two looks at the completions: keeps their latency bounded when
 * the driver has many large commands waiting. */
#define BATCH_BYTES (256u << 10)

#define REQUEST_HEADER offsetof(struct virtio_scsi_cmd_req, cdb)
#define RESPONSE_HEADER offsetof(struct virtio_scsi_cmd_resp, sense)

_Static_assert((int)SCSI_OVERRUN == VIRTIO_SCSI_S_OVERRUN && (int)SCSI_RESET == VIRTIO_SCSI_S_RESET &&
                   (int)SCSI_FAILURE == VIRTIO_SCSI_S_FAILURE,
               "deliveries are responses of virtio");

/* A command in flight. */
struct slot {
    struct scsi_command command;
    struct virtio_scsi_queue *queue;
    struct slot *next_free;
    bool in_flight;
    uint8_t end;            /* if it is cancelled: with this delivery */
    uint16_t head;
    uint32_t address;       /* target << 16 | LUN */
    uint64_t tag;
    uint64_t number;        /* commands are numbered as they start */
    uint32_t data_bytes;    /* data-out and data-in, as the driver sent them */
    struct iovec *response; /* where the response goes: the first entries are `response_count` */
    uint32_t response_count;
    struct iovec *iov;      /* one more than the queue is long */
};

struct virtio_scsi_queue {
    const struct virtio_scsi_map *map;
    enum blk_engine engine;
    struct virtio_irq *irq;
    uint32_t request_size;  /* of the header with its CDB */
    uint32_t response_size; /* of the header with its sense data */
    uint32_t cdb_size;
    bool stopping; /* atomic */
    bool cancelling; /* atomic: what is in flight when it stops */
    struct virtq_side side;
    struct blk_io *io;
    struct scsi_worker worker;
    struct virtio_scsi_counters counters;
    uint32_t in_flight;
    uint64_t started; /* commands, ever */
    struct slot *free;
    struct slot *slots;
    struct iovec *iov;
    struct virtio_scsi_part *working; /* parts of functions that wait for commands to end */

    pthread_mutex_t lock; /* for the next three */
    bool running;
    struct virtio_scsi_part *posted; /* atomic, so that a look at it needs no lock */
    struct virtio_scsi_part **posted_end; /* where the next one is put */
};

/* --- which logical unit ----------------------------------------------------------------------- */

/* The first unit of `map` whose address is not below this one. */
static uint32_t lower_bound(const struct virtio_scsi_map *map, uint32_t address)
{
    uint32_t low = 0, high = map->count;

    while (low < high) {
        uint32_t middle = (low + high) / 2;

        if (map->units[middle].address < address)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* The LUN in an address: peripheral with bus 0, or flat space (SAM-5, 4.7.5). UINT32_MAX: none. */
static uint32_t lun_of(const uint8_t address[8])
{
    if ((address[2] != 0 && address[2] >> 6 != 1) ||
        (address[4] | address[5] | address[6] | address[7]))
        return UINT32_MAX;
    return (uint32_t)(address[2] & 0x3F) << 8 | address[3];
}

struct virtio_scsi_found virtio_scsi_find(const struct virtio_scsi_map *map,
                                          const uint8_t lun[8])
{
    static const uint8_t all_targets[8] = {0xC1, 0x01};
    static const uint8_t well_known[6] = {0xC1, 0x01}; /* SAM-5, 4.7.5: extended */
    uint32_t target = (uint32_t)lun[1] << 16, number = lun_of(lun), index;
    struct virtio_scsi_found found = {.place = VIRTIO_SCSI_NO_TARGET, .address = target | 0xFFFF};

    if (lun[0] != 1) {
        if (memcmp(lun, all_targets, sizeof(all_targets)) == 0)
            found.place = VIRTIO_SCSI_ALL_TARGETS;
        return found;
    }
    if (number != UINT32_MAX) {
        found.address = target | number;
        /* As a rule they are all at target 0, without gaps. */
        index = number;
        if (index >= map->count || map->units[index].address != found.address)
            index = lower_bound(map, found.address);
        if (index < map->count && map->units[index].address == found.address) {
            found.place = VIRTIO_SCSI_UNIT;
            found.lun = map->units[index].lun;
            return found;
        }
    }
    index = lower_bound(map, target);
    if (index < map->count && map->units[index].address >> 16 == lun[1])
        found.place = memcmp(lun + 2, well_known, sizeof(well_known)) == 0 ? VIRTIO_SCSI_WELL_KNOWN
                                                                         : VIRTIO_SCSI_NO_UNIT;
    return found;
}

/* --- commands that the host device answers for its logical units ------------------------------ */

enum {
    TEST_UNIT_READY = 0x00,
    REQUEST_SENSE = 0x03,
    INQUIRY = 0x12,
    REPORT_LUNS = 0xA0,
};

#define LOGICAL_UNIT_NOT_SUPPORTED SCSI_SENSE(0x5, 0x25, 0x00)
#define INSUFFICIENT_RESOURCES SCSI_SENSE(0xB, 0x55, 0x03)

#define NONE SCSI_NO_SERVICE_ACTION
static const struct scsi_opcode host_table[] = {
    {TEST_UNIT_READY, 6, NONE, {TEST_UNIT_READY}, NULL, 0},
    {REQUEST_SENSE, 6, NONE, {REQUEST_SENSE, 0x01, 0, 0, 0xFF}, NULL, 0},
    {INQUIRY, 6, NONE, {INQUIRY, 0x01, 0xFF, 0xFF, 0xFF}, NULL, 0},
    {REPORT_LUNS, 12, NONE, {REPORT_LUNS, 0, 0xFF, 0, 0, 0, 0xFF, 0xFF, 0xFF, 0xFF}, NULL, 0},
};
static const struct scsi_opcodes host_opcodes = {host_table, 4};

/* SAM-5, 4.7.5: as short as can be. */
static void put_lun(uint8_t *at, uint32_t number)
{
    if (number < 256)
        at[1] = (uint8_t)number;
    else
        scsi_put_be16(at, (uint16_t)(0x4000 | number));
}

/* The addresses of the units in [first, end), with `all` those of the device in the form that the
 * driver uses. They have nothing more to say about a change of the list (SPC-4, 6.33). */
static void list_units(const struct virtio_scsi_map *map, uint32_t first, uint32_t end, bool all,
                       uint8_t *list)
{
    for (uint32_t i = first; i < end; i++, list += 8) {
        const struct virtio_scsi_unit *unit = &map->units[i];

        if (all) {
            list[0] = 1;
            list[1] = (uint8_t)(unit->address >> 16);
        }
        put_lun(list + (all ? 2 : 0), unit->address & 0xFFFF);
        scsi_attention_drop(unit->lun, SCSI_ATTENTION_LUNS_CHANGED);
    }
}

/* SPC-4, 6.33 */
static void report_luns(const struct virtio_scsi_map *map, const struct virtio_scsi_found *found,
                        struct scsi_command *command)
{
    bool all = found->place == VIRTIO_SCSI_ALL_TARGETS;
    uint32_t target = found->address & 0xFF0000;
    uint32_t first = all ? 0 : lower_bound(map, target);
    uint32_t end = all ? map->count : lower_bound(map, target + 0x10000);
    uint32_t allocated = scsi_be32(command->cdb + 6);
    bool units = false, well_known = false;
    uint32_t size;
    uint8_t *data;

    switch (command->cdb[2]) { /* SELECT REPORT */
    case 0x02:
        well_known = true; /* fall through */
    case 0x00:
    case 0x11: /* the same, as there are no conglomerates of logical units */
        units = true;
        break;
    case 0x01:
        well_known = true;
        break;
    case 0x10: /* administrative and subsidiary ones */
    case 0x12:
        break;
    default:
        scsi_invalid_field(command, 2, 7);
        return;
    }
    if (allocated < 16) {
        scsi_invalid_field(command, 6, 7);
        return;
    }
    size = 8 + 8 * ((units ? end - first : 0) + well_known);
    data = calloc(1, size);
    if (!data) {
        scsi_sense(command, INSUFFICIENT_RESOURCES);
        return;
    }
    scsi_put_be32(data, size - 8);
    if (units)
        list_units(map, first, end, all, data + 8);
    if (well_known)
        scsi_put_be16(data + size - 8, 0xC101);
    scsi_answer(command, data, size, allocated);
    free(data);
}

/* Peripheral qualifiers and types (SPC-4, 6.6.2). */
enum {
    WELL_KNOWN_UNIT = 0x1E,
    NO_UNIT = 0x7F,
};

/* Of a place without a logical unit of its own: as much of it as there is. */
static void host_inquiry(uint8_t type, struct scsi_command *command)
{
    const uint8_t *cdb = command->cdb;
    const char *product = type == WELL_KNOWN_UNIT ? "REPORT LUNS     " : "no logical unit ";
    uint8_t data[36] = {type, 0, 0x06, 0x02, 36 - 5}; /* version SPC-4, response data format 2 */

    if (!(cdb[1] & 1) && cdb[2] == 0) {
        memcpy(data + 8, "pyvmm   ", 8);
        memcpy(data + 16, product, 16);
        memcpy(data + 32, "1   ", 4);
        scsi_answer(command, data, sizeof(data), scsi_be16(cdb + 3));
    } else if ((cdb[1] & 1) && cdb[2] == 0) {
        const uint8_t pages[5] = {type, 0, 0, 1, 0}; /* supported VPD pages: this one */

        scsi_answer(command, pages, sizeof(pages), scsi_be16(cdb + 3));
    } else {
        scsi_invalid_field(command, 2, 7);
    }
}

/* A command to a place where there is no logical unit, or a well-known one. */
static void host_execute(const struct virtio_scsi_map *map, const struct virtio_scsi_found *found,
                         struct scsi_command *command)
{
    bool well_known = found->place != VIRTIO_SCSI_NO_UNIT;
    /* LUN 0 answers REPORT LUNS whether it exists or not (SPC-4, 6.33). */
    bool lists = well_known || (found->address & 0xFFFF) == 0;
    uint8_t opcode = command->cdb[0];
    uint8_t sense[SCSI_SENSE_MAX];
    uint32_t size;

    if (!well_known && opcode != INQUIRY && opcode != REQUEST_SENSE &&
        !(opcode == REPORT_LUNS && lists)) {
        scsi_sense(command, LOGICAL_UNIT_NOT_SUPPORTED);
        return;
    }
    if (!scsi_find(&host_opcodes, 0, command))
        return;
    switch (opcode) {
    case TEST_UNIT_READY:
        break;
    case REQUEST_SENSE:
        size = scsi_format_sense(sense, well_known ? 0 : LOGICAL_UNIT_NOT_SUPPORTED,
                                 command->cdb[1] & 1);
        scsi_answer(command, sense, size, command->cdb[4]);
        break;
    case INQUIRY:
        host_inquiry(well_known ? WELL_KNOWN_UNIT : NO_UNIT, command);
        break;
    case REPORT_LUNS:
        report_luns(map, found, command);
        break;
    }
}

/* --- completion ------------------------------------------------------------------------------- */

/* Counters have one writer, and readers that only look. */
static void count(uint64_t *counter)
{
    __atomic_store_n(counter, *counter + 1, __ATOMIC_RELAXED);
}

static bool is_meant(const struct virtio_scsi_function *function, const struct slot *slot)
{
    if (!slot->in_flight)
        return false;
    if (function->one && slot->tag != function->tag)
        return false;
    if (function->lun)
        return slot->command.lun == function->lun;
    return function->target >= 0 && (int32_t)(slot->address >> 16) == function->target;
}

/* A queue has done its part. The function may be gone on return. */
static void end_part(struct virtio_scsi_function *function)
{
    int done_fd = function->done_fd;

    /* Release: pairs with the acquire of the one who sees that nothing is pending. */
    if (__atomic_sub_fetch(&function->pending, 1, __ATOMIC_ACQ_REL) == 0 && done_fd >= 0)
        eventfd_signal(done_fd);
}

/* A command has ended that functions may wait for. */
static void tell_functions(struct virtio_scsi_queue *queue, const struct slot *slot)
{
    struct virtio_scsi_part **link = &queue->working;

    while (*link) {
        struct virtio_scsi_part *part = *link;

        if (slot->number < part->before && is_meant(part->function, slot) && --part->left == 0) {
            *link = part->next;
            end_part(part->function);
        } else {
            link = &part->next;
        }
    }
}

/* Copies the response, which the driver may have scattered. */
static void put_response(const struct slot *slot, const uint8_t *from, uint32_t size)
{
    for (uint32_t i = 0; i < slot->response_count && size > 0; i++) {
        const struct iovec *iov = &slot->response[i];
        uint32_t chunk = iov->iov_len < size ? (uint32_t)iov->iov_len : size;

        memcpy(iov->iov_base, from, chunk);
        from += chunk;
        size -= chunk;
    }
}

/* Returns the chain with the response, or without one if it has no room for it. */
static void complete(struct slot *slot)
{
    struct virtio_scsi_queue *queue = slot->queue;
    struct scsi_command *command = &slot->command;
    uint32_t filled = 0;

    assert(slot->in_flight); /* exactly once */
    if (slot->end)
        command->delivery = slot->end;
    if (command->delivery != SCSI_DELIVERED)
        command->transferred = 0;
    if (slot->response_count > 0) {
        uint8_t response[RESPONSE_HEADER + SCSI_SENSE_MAX];
        struct virtio_scsi_cmd_resp *header = (struct virtio_scsi_cmd_resp *)response;

        memset(response, 0, queue->response_size);
        header->response = command->delivery;
        header->resid = slot->data_bytes - command->transferred;
        if (command->delivery == SCSI_DELIVERED) {
            uint32_t room = queue->response_size - RESPONSE_HEADER;

            header->status = command->status;
            header->status_qualifier = command->status_qualifier;
            header->sense_len = command->sense_size < room ? command->sense_size : room;
            memcpy(response + RESPONSE_HEADER, command->sense, header->sense_len);
        }
        put_response(slot, response, queue->response_size);
        filled = queue->response_size + (command->out.bytes ? 0 : command->transferred);
    }
    virtq_push(&queue->side.vq, slot->head, filled);
    count(&queue->counters.requests);
    if (command->delivery != SCSI_DELIVERED || command->status != SCSI_GOOD)
        count(&queue->counters.failed);
    if (queue->working)
        tell_functions(queue, slot);
    slot->in_flight = false;
    queue->in_flight--;
    slot->next_free = queue->free;
    queue->free = slot;
}

static void command_done(struct scsi_command *command)
{
    complete((struct slot *)command); /* its first member */
}

/* --- parsing ---------------------------------------------------------------------------------- */

/* A run of buffers. Framing is the driver's choice (2.7.4): any field may be split. */
static void take(struct scsi_data *data, void *to, uint32_t size)
{
    uint8_t *out = to;

    data->bytes -= size;
    while (size > 0) {
        struct iovec *iov = data->iov;
        uint32_t chunk = iov->iov_len < size ? (uint32_t)iov->iov_len : size;

        memcpy(out, iov->iov_base, chunk);
        out += chunk;
        size -= chunk;
        iov->iov_base = (uint8_t *)iov->iov_base + chunk;
        iov->iov_len -= chunk;
        if (iov->iov_len == 0) {
            data->iov++;
            data->count--;
        }
    }
}

/* Sets the first `size` bytes aside for the response; the buffers must have as many. The array has
 * room for one entry more, as one may have to be divided. */
static void set_response_aside(struct slot *slot, struct scsi_data *data, uint32_t size)
{
    uint32_t i = 0;

    slot->response = data->iov;
    data->bytes -= size;
    for (; size > data->iov[i].iov_len; i++)
        size -= (uint32_t)data->iov[i].iov_len;
    if (size < data->iov[i].iov_len) {
        memmove(&data->iov[i + 1], &data->iov[i], (data->count - i) * sizeof(*data->iov));
        data->count++;
        data->iov[i].iov_len = size;
        data->iov[i + 1].iov_base = (uint8_t *)data->iov[i + 1].iov_base + size;
        data->iov[i + 1].iov_len -= size;
    }
    slot->response_count = i + 1;
    data->iov += i + 1;
    data->count -= i + 1;
}

/* Takes the header and the place for the response off the chain. False when there is something
 * amiss with the request: what can be answered of it is set up. */
static bool parse(struct slot *slot, const struct virtq_chain *chain,
                  struct virtio_scsi_cmd_req *header)
{
    struct virtio_scsi_queue *queue = slot->queue;
    struct scsi_command *command = &slot->command;

    command->out = (struct scsi_data){chain->iov, chain->readable, chain->readable_bytes};
    command->in = (struct scsi_data){chain->iov + chain->readable, chain->writable,
                                     chain->writable_bytes};
    slot->head = chain->head;
    slot->address = UINT32_MAX;
    slot->data_bytes = 0;
    slot->response_count = 0;
    if (command->in.bytes < queue->response_size)
        return false;
    set_response_aside(slot, &command->in, queue->response_size);
    if (command->out.bytes < queue->request_size)
        return false;
    take(&command->out, header, REQUEST_HEADER);
    take(&command->out, command->cdb, queue->cdb_size);
    __asm__ volatile("" : : : "memory"); /* the compiler must not read guest memory again */
    slot->tag = header->tag;
    /* Data in both directions would need VIRTIO_SCSI_F_INOUT. */
    if (command->in.bytes && command->out.bytes)
        return false;
    slot->data_bytes = command->in.bytes + command->out.bytes;
    return true;
}

/* Starts the command in `chain`, whose vector is the slot's. Returns the bytes to transfer. */
static uint32_t start(struct slot *slot, const struct virtq_chain *chain)
{
    struct virtio_scsi_queue *queue = slot->queue;
    struct scsi_command *command = &slot->command;
    struct virtio_scsi_cmd_req header;
    struct virtio_scsi_found found;
    uint32_t bytes;

    queue->in_flight++;
    slot->in_flight = true;
    slot->end = SCSI_DELIVERED;
    slot->number = queue->started++;
    command->lun = NULL;
    command->io = queue->io;
    command->delivery = SCSI_DELIVERED;
    command->status = SCSI_GOOD;
    command->status_qualifier = 0;
    command->transferred = 0;
    command->sense_size = 0;
    command->cancelled = false;
    if (!parse(slot, chain, &header)) {
        command->delivery = SCSI_FAILURE;
        complete(slot);
        return 0;
    }
    found = virtio_scsi_find(queue->map, header.lun);
    bytes = slot->data_bytes;
    slot->address = found.address;
    command->lun = found.lun;
    if (found.place == VIRTIO_SCSI_NO_TARGET) {
        command->delivery = SCSI_BAD_TARGET;
        complete(slot);
    } else if (found.place == VIRTIO_SCSI_UNIT && command->cdb[0] != REPORT_LUNS) {
        scsi_execute(command);
    } else {
        if (found.place != VIRTIO_SCSI_UNIT)
            host_execute(queue->map, &found, command);
        else if (scsi_find(&host_opcodes, 0, command))
            report_luns(queue->map, &found, command);
        complete(slot);
    }
    return bytes;
}

/* --- functions -------------------------------------------------------------------------------- */

/* Does the queue's part of a function; the rest of it follows as commands end. */
static void work(struct virtio_scsi_queue *queue, struct virtio_scsi_part *part)
{
    struct virtio_scsi_function *function = part->function;

    if (function->map)
        queue->map = function->map;
    part->before = queue->started;
    part->left = 1; /* this function itself */
    part->next = queue->working;
    queue->working = part;
    for (uint32_t i = 0; i < queue->side.vq.size; i++) {
        struct slot *slot = &queue->slots[i];

        if (!is_meant(function, slot))
            continue;
        __atomic_fetch_add(&function->matched, 1, __ATOMIC_RELAXED);
        if (!function->end)
            continue;
        part->left++;
        if (slot->end)
            continue;
        slot->end = function->end;
        slot->command.cancelled = true;
        if (slot->command.lun && slot->command.lun->ops->cancel)
            slot->command.lun->ops->cancel(slot->command.lun, &slot->command);
    }
    if (--part->left == 0) {
        queue->working = part->next; /* still the first */
        end_part(function);
    }
}

void virtio_scsi_post(struct virtio_scsi_function *function,
                      struct virtio_scsi_queue *const *queues, uint32_t queue_count)
{
    assert(queue_count <= VIRTIO_SCSI_MAX_QUEUES);
    function->matched = 0;
    __atomic_store_n(&function->pending, queue_count + 1, __ATOMIC_RELAXED);
    for (uint32_t i = 0; i < queue_count; i++) {
        struct virtio_scsi_queue *queue = queues[i];
        struct virtio_scsi_part *part = &function->parts[i];

        part->function = function;
        pthread_mutex_lock(&queue->lock);
        if (queue->running) {
            part->next = NULL;
            __atomic_store_n(queue->posted_end, part, __ATOMIC_RELAXED);
            queue->posted_end = &part->next;
            eventfd_signal(queue->side.kick_fd);
        } else {
            work(queue, part); /* no command is in flight */
        }
        pthread_mutex_unlock(&queue->lock);
    }
    end_part(function);
}

/* The parts that were posted, in that order. With the lock held. */
static struct virtio_scsi_part *take_posted(struct virtio_scsi_queue *queue)
{
    struct virtio_scsi_part *part = queue->posted;

    __atomic_store_n(&queue->posted, NULL, __ATOMIC_RELAXED);
    queue->posted_end = &queue->posted;
    return part;
}

static void work_on(struct virtio_scsi_queue *queue, struct virtio_scsi_part *part)
{
    while (part) {
        struct virtio_scsi_part *next = part->next;

        work(queue, part);
        part = next;
    }
}

/* --- the loop --------------------------------------------------------------------------------- */

/* Starts what the driver made available. True when there may be more; otherwise the driver was
 * asked to notify of the next chain, a completion comes first, or the ring is broken. */
static bool start_available(struct virtio_scsi_queue *queue)
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
        queue->free = slot->next_free;
        bytes += start(slot, &chain);
    }
    return true;
}

/* Completes the commands that other threads have ended. */
static void collect_finished(struct virtio_scsi_queue *queue)
{
    struct scsi_command *command = scsi_worker_take(&queue->worker);

    while (command) {
        struct scsi_command *next = command->next;

        scsi_done(command);
        command = next;
    }
}

static void publish(struct virtio_scsi_queue *queue)
{
    __atomic_store_n(&queue->counters.malformed, queue->side.vq.malformed, __ATOMIC_RELAXED);
    if (virtq_publish(&queue->side.vq)) {
        count(&queue->counters.interrupts);
        virtio_irq_raise(queue->irq, VIRTIO_IRQ_VRING);
    }
}

static void cancel_all(struct virtio_scsi_queue *queue)
{
    for (uint32_t i = 0; i < queue->side.vq.size; i++) {
        struct scsi_command *command = &queue->slots[i].command;

        if (!queue->slots[i].in_flight || command->cancelled)
            continue;
        command->cancelled = true;
        if (command->lun && command->lun->ops->cancel)
            command->lun->ops->cancel(command->lun, command);
    }
    blk_io_cancel_held(queue->io);
}

/* Waits for the commands that the engine has no part in. */
static void await_others(struct virtio_scsi_queue *queue)
{
    while (queue->in_flight > blk_io_in_flight(queue->io)) {
        struct pollfd wake = {.fd = queue->side.kick_fd, .events = POLLIN};

        poll(&wake, 1, -1);
        eventfd_take(queue->side.kick_fd);
        collect_finished(queue);
    }
}

static int serve(struct virtio_scsi_queue *queue)
{
    int error;

    do {
        struct virtio_scsi_part *posted = NULL;
        bool more;

        /* Taken first: what the driver asked for before them is started, and so found. */
        if (__atomic_load_n(&queue->posted, __ATOMIC_RELAXED)) {
            pthread_mutex_lock(&queue->lock);
            posted = take_posted(queue);
            pthread_mutex_unlock(&queue->lock);
        }
        more = start_available(queue);
        while (posted && more)
            more = start_available(queue);
        work_on(queue, posted);
        collect_finished(queue);
        publish(queue);
        error = blk_io_wait(queue->io, !more && !queue->side.vq.broken); /* a stop ends it, too */
    } while (!error && !queue->side.vq.broken && !__atomic_load_n(&queue->stopping, __ATOMIC_ACQUIRE));
    if (__atomic_load_n(&queue->cancelling, __ATOMIC_RELAXED) || queue->side.vq.broken) {
        cancel_all(queue);
        blk_io_cancel_held(queue->io);
    }
    collect_finished(queue);
    while (!error && queue->in_flight > 0) {
        error = blk_io_wait(queue->io, true);
        collect_finished(queue);
    }
    await_others(queue); /* there are none unless the engine failed */
    publish(queue);
    if (error)
        return error;
    return queue->side.vq.broken ? VIRTIO_SCSI_BROKEN : VIRTIO_SCSI_STOPPED;
}

/* From now on functions are posted to the queue. */
static void begin_running(struct virtio_scsi_queue *queue)
{
    pthread_mutex_lock(&queue->lock);
    queue->running = true;
    pthread_mutex_unlock(&queue->lock);
}

/* From now on those who post functions do the queue's part themselves. */
static void end_running(struct virtio_scsi_queue *queue)
{
    pthread_mutex_lock(&queue->lock);
    queue->running = false;
    /* Only if the engine failed: nobody will end these commands, and nobody is to wait. */
    for (uint32_t i = 0; i < queue->side.vq.size; i++)
        queue->slots[i].in_flight = false;
    while (queue->working) {
        struct virtio_scsi_part *part = queue->working;

        queue->working = part->next;
        end_part(part->function);
    }
    work_on(queue, take_posted(queue));
    pthread_mutex_unlock(&queue->lock);
}

int virtio_scsi_queue_run(struct virtio_scsi_queue *queue)
{
    int result;

    queue->io = blk_io_create(queue->engine, queue->side.vq.size);
    if (!queue->io)
        return -errno;
    begin_running(queue);
    result = blk_io_watch(queue->io, queue->side.kick_fd);
    if (result == 0)
        result = serve(queue);
    end_running(queue);
    blk_io_destroy(queue->io);
    __atomic_store_n(&queue->stopping, false, __ATOMIC_RELAXED);
    return result;
}

void virtio_scsi_queue_stop(struct virtio_scsi_queue *queue, bool cancel)
{
    __atomic_store_n(&queue->cancelling, cancel, __ATOMIC_RELAXED);
    __atomic_store_n(&queue->stopping, true, __ATOMIC_RELEASE);
    eventfd_signal(queue->side.kick_fd);
}

void virtio_scsi_queue_wake(struct virtio_scsi_queue *queue)
{
    eventfd_signal(queue->side.kick_fd);
}

/* --- create and destroy ----------------------------------------------------------------------- */

static void init_slots(struct virtio_scsi_queue *queue)
{
    uint32_t size = queue->side.vq.size;

    for (uint32_t i = size; i-- > 0;) {
        struct slot *slot = &queue->slots[i];

        slot->queue = queue;
        slot->command.worker = &queue->worker;
        slot->command.cdb_size = queue->cdb_size;
        slot->command.done = command_done;
        slot->iov = &queue->iov[(size_t)i * (size + 1)];
        slot->next_free = queue->free;
        queue->free = slot;
    }
}

struct virtio_scsi_queue *virtio_scsi_queue_create(const struct virtio_scsi_map *map,
                                                   const struct virtio_scsi_sizes *sizes,
                                                   enum blk_engine engine,
                                                   const struct guest_mem *memory,
                                                   const struct virtq_config *config, int kick_fd,
                                                   struct virtio_irq *irq)
{
    struct virtio_scsi_queue *queue = calloc(1, sizeof(*queue));
    uint32_t size = config->size;

    if (!queue)
        return NULL;
    queue->map = map;
    queue->engine = engine;
    queue->irq = irq;
    queue->side.kick_fd = kick_fd;
    queue->posted_end = &queue->posted;
    queue->cdb_size = sizes->cdb_size;
    queue->request_size = REQUEST_HEADER + sizes->cdb_size;
    queue->response_size = RESPONSE_HEADER + sizes->sense_size;
    if (virtq_init(&queue->side.vq, memory, config) < 0) {
        free(queue);
        errno = EINVAL;
        return NULL;
    }
    queue->slots = calloc(size, sizeof(*queue->slots));
    queue->iov = calloc((size_t)size * (size + 1), sizeof(*queue->iov)); /* mostly never touched */
    if (!queue->slots || !queue->iov || scsi_worker_init(&queue->worker, kick_fd) < 0 ||
        pthread_mutex_init(&queue->lock, NULL)) {
        virtio_scsi_queue_destroy(queue);
        errno = ENOMEM;
        return NULL;
    }
    init_slots(queue);
    return queue;
}

void virtio_scsi_queue_destroy(struct virtio_scsi_queue *queue)
{
    if (!queue)
        return;
    pthread_mutex_destroy(&queue->lock);
    scsi_worker_destroy(&queue->worker);
    free(queue->iov);
    free(queue->slots);
    free(queue);
}

struct virtio_scsi_counters virtio_scsi_queue_counters(const struct virtio_scsi_queue *queue)
{
    const struct virtio_scsi_counters *counters = &queue->counters;

    return (struct virtio_scsi_counters){
        .requests = __atomic_load_n(&counters->requests, __ATOMIC_RELAXED),
        .failed = __atomic_load_n(&counters->failed, __ATOMIC_RELAXED),
        .interrupts = __atomic_load_n(&counters->interrupts, __ATOMIC_RELAXED),
        .malformed = __atomic_load_n(&counters->malformed, __ATOMIC_RELAXED),
    };
}
