#include "scsi.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "worker.h"

enum {
    REPORT_LUNS = 0xA0,
    REQUEST_SENSE = 0x03,
    INQUIRY = 0x12,
    GET_CONFIGURATION = 0x46,
    GET_EVENT_STATUS_NOTIFICATION = 0x4A,
};

#define INVALID_OPCODE SCSI_SENSE(0x5, 0x20, 0x00)
#define INVALID_FIELD_IN_CDB SCSI_SENSE(0x5, 0x24, 0x00)
#define INVALID_FIELD_IN_PARAMETER_LIST SCSI_SENSE(0x5, 0x26, 0x00)

/* --- logical units and their unit attention conditions ------------------------------------- */

int scsi_lun_init(struct scsi_lun *lun, const struct scsi_lun_ops *ops,
                  const struct scsi_page *pages, uint32_t page_count)
{
    *lun = (struct scsi_lun){.ops = ops, .pages = pages, .page_count = page_count};
    return -pthread_mutex_init(&lun->lock, NULL);
}

void scsi_lun_destroy(struct scsi_lun *lun)
{
    pthread_mutex_destroy(&lun->lock);
}

static void set_count(struct scsi_lun *lun, uint32_t count)
{
    __atomic_store_n(&lun->attention_count, count, __ATOMIC_RELAXED);
}

/* With the lock held. One that finds no room takes the place of the youngest: after so many, a
 * driver has to look at everything again anyway. */
static void add_attention(struct scsi_lun *lun, uint32_t attention)
{
    uint32_t count = lun->attention_count;

    for (uint32_t i = 0; i < count; i++)
        if (lun->attentions[i] == attention)
            return;
    if (count == SCSI_MAX_ATTENTIONS)
        count--;
    lun->attentions[count] = attention;
    set_count(lun, count + 1);
}

void scsi_attention(struct scsi_lun *lun, uint32_t attention)
{
    pthread_mutex_lock(&lun->lock);
    add_attention(lun, attention);
    pthread_mutex_unlock(&lun->lock);
}

void scsi_lun_reset(struct scsi_lun *lun, uint32_t attention)
{
    if (lun->ops->reset)
        lun->ops->reset(lun);
    pthread_mutex_lock(&lun->lock);
    set_count(lun, 0);
    add_attention(lun, attention);
    pthread_mutex_unlock(&lun->lock);
}

/* With the lock held. */
static void remove_attention(struct scsi_lun *lun, uint32_t index)
{
    set_count(lun, lun->attention_count - 1);
    memmove(lun->attentions + index, lun->attentions + index + 1,
            (lun->attention_count - index) * sizeof(lun->attentions[0]));
}

uint32_t scsi_attention_take(struct scsi_lun *lun)
{
    uint32_t attention = 0;

    pthread_mutex_lock(&lun->lock);
    if (lun->attention_count > 0) {
        attention = lun->attentions[0];
        remove_attention(lun, 0);
    }
    pthread_mutex_unlock(&lun->lock);
    return attention;
}

void scsi_attention_drop(struct scsi_lun *lun, uint32_t attention)
{
    pthread_mutex_lock(&lun->lock);
    for (uint32_t i = 0; i < lun->attention_count; i++) {
        if (lun->attentions[i] == attention) {
            remove_attention(lun, i);
            break;
        }
    }
    pthread_mutex_unlock(&lun->lock);
}

/* --- the life of a command ------------------------------------------------------------------ */

/* These are executed whatever is pending (SAM-5, unit attention conditions; MMC-6, 4.1.6.1). */
static bool ignores_attentions(uint8_t opcode)
{
    return opcode == INQUIRY || opcode == REPORT_LUNS || opcode == REQUEST_SENSE ||
           opcode == GET_CONFIGURATION || opcode == GET_EVENT_STATUS_NOTIFICATION;
}

void scsi_execute(struct scsi_command *command)
{
    struct scsi_lun *lun = command->lun;

    if (__atomic_load_n(&lun->attention_count, __ATOMIC_RELAXED) > 0 &&
        !ignores_attentions(command->cdb[0])) {
        uint32_t attention = scsi_attention_take(lun);

        if (attention) { /* else another worker has just reported it */
            scsi_sense(command, attention);
            scsi_done(command);
            return;
        }
    }
    lun->ops->execute(lun, command);
}

void scsi_done(struct scsi_command *command)
{
    command->done(command);
}

void scsi_done_elsewhere(struct scsi_command *command)
{
    struct scsi_worker *worker = command->worker;

    /* The lock is held until the worker has been woken up: it, and its eventfd, may go as soon as
     * the last command has been taken. */
    pthread_mutex_lock(&worker->lock);
    command->next = worker->finished;
    __atomic_store_n(&worker->finished, command, __ATOMIC_RELAXED);
    eventfd_signal(worker->wake_fd);
    pthread_mutex_unlock(&worker->lock);
}

int scsi_worker_init(struct scsi_worker *worker, int wake_fd)
{
    *worker = (struct scsi_worker){.wake_fd = wake_fd};
    return -pthread_mutex_init(&worker->lock, NULL);
}

void scsi_worker_destroy(struct scsi_worker *worker)
{
    pthread_mutex_destroy(&worker->lock);
}

struct scsi_command *scsi_worker_take(struct scsi_worker *worker)
{
    struct scsi_command *finished;

    if (!__atomic_load_n(&worker->finished, __ATOMIC_RELAXED))
        return NULL;
    pthread_mutex_lock(&worker->lock);
    finished = worker->finished;
    __atomic_store_n(&worker->finished, NULL, __ATOMIC_RELAXED);
    pthread_mutex_unlock(&worker->lock);
    return finished;
}

/* --- answers -------------------------------------------------------------------------------- */

uint32_t scsi_format_sense(uint8_t *sense, uint32_t code, bool descriptor)
{
    uint8_t key = (uint8_t)(code >> 16 & 0xF), asc = (uint8_t)(code >> 8), ascq = (uint8_t)code;

    memset(sense, 0, 18);
    if (descriptor) { /* SPC-4, 4.5.2 */
        sense[0] = 0x72;
        sense[1] = key;
        sense[2] = asc;
        sense[3] = ascq;
        return 8;
    }
    sense[0] = 0x70; /* SPC-4, 4.5.3 */
    sense[2] = key;
    sense[7] = 18 - 8;
    sense[12] = asc;
    sense[13] = ascq;
    return 18;
}

static bool descriptor_sense(const struct scsi_command *command)
{
    return command->lun && __atomic_load_n(&command->lun->descriptor_sense, __ATOMIC_RELAXED);
}

void scsi_sense(struct scsi_command *command, uint32_t sense)
{
    command->delivery = SCSI_DELIVERED;
    command->status = SCSI_CHECK_CONDITION;
    command->transferred = 0;
    command->sense_size = scsi_format_sense(command->sense, sense, descriptor_sense(command));
}

/* Adds the three bytes that go with a sense key (SPC-4, 4.5.2.4). */
static void add_key_specific(struct scsi_command *command, const uint8_t bytes[3])
{
    uint8_t *sense = command->sense;

    if (!descriptor_sense(command)) {
        memcpy(sense + 15, bytes, 3);
        return;
    }
    sense[7] = 8; /* a sense key specific descriptor follows */
    sense[8] = 2;
    sense[9] = 6;
    memcpy(sense + 12, bytes, 3);
    command->sense_size = 16;
}

static void invalid(struct scsi_command *command, uint32_t sense, uint8_t in_cdb, uint32_t byte,
                    int bit)
{
    uint8_t pointer = bit < 0 ? 0 : (uint8_t)(0x08 | bit); /* BPV, BIT POINTER */
    uint8_t bytes[3] = {(uint8_t)(0x80 | in_cdb | pointer)}; /* SKSV, C/D */

    scsi_put_be16(bytes + 1, (uint16_t)byte);
    scsi_sense(command, sense);
    add_key_specific(command, bytes);
}

void scsi_invalid_field(struct scsi_command *command, uint32_t byte, int bit)
{
    invalid(command, INVALID_FIELD_IN_CDB, 0x40, byte, bit);
}

void scsi_invalid_parameter(struct scsi_command *command, uint32_t byte, int bit)
{
    invalid(command, INVALID_FIELD_IN_PARAMETER_LIST, 0, byte, bit);
}

void scsi_answer(struct scsi_command *command, const void *data, uint32_t size,
                 uint32_t allocated)
{
    const uint8_t *from = data;
    const struct iovec *iov = command->in.iov;

    if (size > allocated)
        size = allocated;
    if (size > command->in.bytes) {
        command->delivery = SCSI_OVERRUN;
        return;
    }
    command->status = SCSI_GOOD;
    command->transferred = size;
    for (; size > 0; iov++) {
        uint32_t chunk = iov->iov_len < size ? (uint32_t)iov->iov_len : size;

        memcpy(iov->iov_base, from, chunk);
        from += chunk;
        size -= chunk;
    }
}

bool scsi_parameters(struct scsi_command *command, void *to, uint32_t size)
{
    uint8_t *out = to;
    const struct iovec *iov = command->out.iov;

    if (size > command->out.bytes) {
        command->delivery = SCSI_OVERRUN;
        return false;
    }
    command->transferred = size;
    for (; size > 0; iov++) {
        uint32_t chunk = iov->iov_len < size ? (uint32_t)iov->iov_len : size;

        memcpy(out, iov->iov_base, chunk);
        out += chunk;
        size -= chunk;
    }
    __asm__ volatile("" : : : "memory"); /* the compiler must not read guest memory again */
    return true;
}

bool scsi_data_trim(struct scsi_data *data, uint32_t bytes)
{
    uint32_t left = bytes;

    if (bytes > data->bytes)
        return false;
    if (bytes == data->bytes)
        return true;
    data->bytes = bytes;
    for (uint32_t i = 0; left > 0; i++) {
        if (data->iov[i].iov_len >= left) {
            data->iov[i].iov_len = left;
            data->count = i + 1;
            return true;
        }
        left -= (uint32_t)data->iov[i].iov_len;
    }
    data->count = 0;
    return true;
}

/* --- dispatch ------------------------------------------------------------------------------- */

static uint32_t key_of(const struct scsi_opcode *entry)
{
    return (uint32_t)entry->opcode << 16 | entry->service_action;
}

/* The first entry that is not below `key`. */
static const struct scsi_opcode *search(const struct scsi_opcodes *opcodes, uint32_t key)
{
    uint32_t low = 0, high = opcodes->count;

    while (low < high) {
        uint32_t middle = (low + high) / 2;

        if (key_of(&opcodes->table[middle]) < key)
            low = middle + 1;
        else
            high = middle;
    }
    return opcodes->table + low;
}

/* Whether a bit of the CDB is set that is not evaluated. */
static bool has_extra_bits(const uint8_t *cdb, const struct scsi_opcode *entry)
{
    uint64_t given[2], usage[2];

    memcpy(given, cdb, sizeof(given)); /* a CDB has room for the longest */
    memcpy(usage, entry->usage, sizeof(usage));
    if (entry->size < 8)
        given[0] &= (1ull << 8 * entry->size) - 1;
    if (entry->size < 16)
        given[1] &= entry->size > 8 ? (1ull << 8 * (entry->size - 8)) - 1 : 0;
    return (given[0] & ~usage[0]) | (given[1] & ~usage[1]);
}

const struct scsi_opcode *scsi_find(const struct scsi_opcodes *opcodes, uint32_t abilities,
                                    struct scsi_command *command)
{
    uint8_t *cdb = command->cdb;
    const struct scsi_opcode *end = opcodes->table + opcodes->count;
    const struct scsi_opcode *entry = search(opcodes, (uint32_t)cdb[0] << 16);

    /* As long as they do not know a unit's version, drivers put the LUN there, as in SCSI-2. */
    if (cdb[0] == INQUIRY)
        cdb[1] &= 0x1F;
    if (entry == end || entry->opcode != cdb[0] || (entry->needs & ~abilities)) {
        scsi_sense(command, INVALID_OPCODE);
        return NULL;
    }
    if (entry->service_action != SCSI_NO_SERVICE_ACTION) {
        /* All of these have it in the same place (SPC-4, 4.2.5). */
        uint32_t wanted = (uint32_t)cdb[0] << 16 | (cdb[1] & 0x1Fu);

        entry = search(opcodes, wanted);
        if (entry == end || key_of(entry) != wanted) {
            scsi_invalid_field(command, 1, 4);
            return NULL;
        }
    }
    if (command->cdb_size < entry->size) {
        scsi_invalid_field(command, command->cdb_size, -1);
        return NULL;
    }
    if (!has_extra_bits(cdb, entry))
        return entry;
    for (uint32_t i = 1; i < entry->size; i++) {
        uint8_t extra = cdb[i] & (uint8_t)~entry->usage[i];

        if (extra) {
            scsi_invalid_field(command, i, 31 - __builtin_clz(extra));
            break;
        }
    }
    return NULL;
}

void scsi_execute_from(const struct scsi_opcodes *opcodes, struct scsi_lun *lun,
                       struct scsi_command *command)
{
    const struct scsi_opcode *entry = scsi_find(opcodes, lun->abilities, command);

    if (entry)
        entry->execute(lun, command);
    else
        scsi_done(command);
}

static void answer_inquiry(struct scsi_lun *lun, struct scsi_command *command)
{
    const uint8_t *cdb = command->cdb;
    bool vital = cdb[1] & 1; /* EVPD */
    uint16_t code = vital ? cdb[2] : SCSI_STANDARD_INQUIRY;

    if (cdb[1] & 0xFE) {
        scsi_invalid_field(command, 1, 31 - __builtin_clz(cdb[1] & 0xFE));
        return;
    }
    for (uint32_t i = 0; i < lun->page_count; i++) {
        const struct scsi_page *page = &lun->pages[i];

        if (page->code == code && (vital || cdb[2] == 0)) {
            scsi_answer(command, page->data, page->size, scsi_be16(cdb + 3));
            return;
        }
    }
    scsi_invalid_field(command, 2, 7);
}

void scsi_inquiry(struct scsi_lun *lun, struct scsi_command *command)
{
    answer_inquiry(lun, command);
    scsi_done(command);
}

/* --- commands for Python -------------------------------------------------------------------- */

struct scsi_handoff {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct scsi_command *first;
    struct scsi_command **end; /* where the next one is put */
    bool stopping;
};

struct scsi_handoff *scsi_handoff_create(void)
{
    struct scsi_handoff *handoff = calloc(1, sizeof(*handoff));
    int error;

    if (!handoff)
        return NULL;
    handoff->end = &handoff->first;
    error = pthread_mutex_init(&handoff->lock, NULL);
    if (!error) {
        error = pthread_cond_init(&handoff->changed, NULL);
        if (!error)
            return handoff;
        pthread_mutex_destroy(&handoff->lock);
    }
    free(handoff);
    errno = error;
    return NULL;
}

void scsi_handoff_destroy(struct scsi_handoff *handoff)
{
    if (!handoff)
        return;
    assert(!handoff->first);
    pthread_cond_destroy(&handoff->changed);
    pthread_mutex_destroy(&handoff->lock);
    free(handoff);
}

void scsi_handoff_give(struct scsi_handoff *handoff, struct scsi_command *command)
{
    command->next = NULL;
    pthread_mutex_lock(&handoff->lock);
    *handoff->end = command;
    handoff->end = &command->next;
    pthread_cond_signal(&handoff->changed);
    pthread_mutex_unlock(&handoff->lock);
}

struct scsi_command *scsi_handoff_take(struct scsi_handoff *handoff)
{
    struct scsi_command *command;

    pthread_mutex_lock(&handoff->lock);
    while (!handoff->first && !handoff->stopping)
        pthread_cond_wait(&handoff->changed, &handoff->lock);
    command = handoff->first;
    if (command) {
        handoff->first = command->next;
        if (!handoff->first)
            handoff->end = &handoff->first;
    }
    pthread_mutex_unlock(&handoff->lock);
    return command;
}

void scsi_handoff_stop(struct scsi_handoff *handoff)
{
    pthread_mutex_lock(&handoff->lock);
    handoff->stopping = true;
    pthread_cond_broadcast(&handoff->changed);
    pthread_mutex_unlock(&handoff->lock);
}
