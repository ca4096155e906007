/* The SCSI host device's queues, under sanitizers and with assertions on: what needs real
 * concurrency, that is commands that end on other threads, functions that end them, and logical
 * units that go while they are used. The rest is tests/unit/test_scsi*.py. */
#include <linux/virtio_ring.h>
#include <linux/virtio_scsi.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"
#include "scsi_disk.h"
#include "virtio_scsi.h"
#include "worker.h"

enum {
    QUEUES = 2,
    QUEUE_SIZE = 64,
    SLOTS = QUEUE_SIZE / 2, /* commands in flight: each has two descriptors */
    AVAIL = 0x1000,
    USED = 0x2000,
    HEADERS = 0x3000,
    RESPONSES = 0x8000,
    STRIDE = 128,
    RAM = RESPONSES + SLOTS * STRIDE,
    REQUEST = 19 + 32,
    RESPONSE = 12 + 96,
    UNTOUCHED = 0xEE,
    COMMANDS = 20000,
};

static const struct virtio_scsi_sizes sizes = {96, 32};

/* --- a logical unit whose commands end on another thread --------------------------------------- */

struct slow_unit {
    struct scsi_lun lun;
    bool closed;
};

static pthread_mutex_t slow_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t slow_changed = PTHREAD_COND_INITIALIZER;
static struct scsi_command *slow_list;
static bool slow_stop;

static void slow_execute(struct scsi_lun *lun, struct scsi_command *command)
{
    CHECK(!((struct slow_unit *)lun)->closed);
    pthread_mutex_lock(&slow_lock);
    command->next = slow_list;
    slow_list = command;
    pthread_cond_signal(&slow_changed);
    pthread_mutex_unlock(&slow_lock);
}

static unsigned cancelled; /* atomic */

static void slow_cancel(struct scsi_lun *lun, struct scsi_command *command)
{
    CHECK(command->lun == lun && command->cancelled);
    __atomic_fetch_add(&cancelled, 1, __ATOMIC_RELAXED);
}

static const struct scsi_lun_ops slow_ops = {.execute = slow_execute, .cancel = slow_cancel};

static void *slow_thread(void *argument)
{
    (void)argument;
    for (;;) {
        struct scsi_command *command;

        pthread_mutex_lock(&slow_lock);
        while (!slow_list && !slow_stop)
            pthread_cond_wait(&slow_changed, &slow_lock);
        command = slow_list;
        slow_list = NULL;
        pthread_mutex_unlock(&slow_lock);
        if (!command)
            return NULL;
        while (command) {
            struct scsi_command *next = command->next;

            command->status = SCSI_CONDITION_MET;
            scsi_done_elsewhere(command);
            command = next;
        }
    }
}

static struct slow_unit *create_unit(void)
{
    struct slow_unit *unit = calloc(1, sizeof(*unit));

    CHECK(unit && scsi_lun_init(&unit->lun, &slow_ops, NULL, 0) == 0);
    return unit;
}

static void close_unit(struct slow_unit *unit)
{
    unit->closed = true;
    scsi_lun_destroy(&unit->lun);
    free(unit); /* AddressSanitizer sees who still uses it */
}

/* --- a driver of one queue -------------------------------------------------------------------- */

struct queue {
    uint8_t *ram;
    struct guest_mem memory;
    struct virtio_irq irq;
    uint32_t interrupt_status;
    int kick;
    struct virtio_scsi_queue *native;
    pthread_t device_thread;
    pthread_t driver_thread;
    bool ended; /* atomic: the driver has sent all of its commands, and has them back */
    unsigned answers[256];
};

static void *run_device(void *argument)
{
    struct queue *queue = argument;

    CHECK(virtio_scsi_queue_run(queue->native) == VIRTIO_SCSI_STOPPED);
    return NULL;
}

static void open_queue(struct queue *queue, const struct virtio_scsi_map *map, enum blk_engine engine)
{
    const struct virtq_config config = {0, AVAIL, USED, QUEUE_SIZE, false, false};

    memset(queue, 0, sizeof(*queue));
    queue->ram = calloc(1, RAM);
    CHECK(queue->ram);
    queue->memory = (struct guest_mem){1, {{0, RAM, queue->ram}}};
    queue->irq = (struct virtio_irq){.status = &queue->interrupt_status, .irqfd = -1};
    queue->kick = eventfd(0, EFD_NONBLOCK);
    queue->native = virtio_scsi_queue_create(map, &sizes, engine, &queue->memory, &config,
                                             queue->kick, &queue->irq);
    CHECK(queue->native);
    CHECK(pthread_create(&queue->device_thread, NULL, run_device, queue) == 0);
}

static void close_queue(struct queue *queue)
{
    virtio_scsi_queue_stop(queue->native, true);
    CHECK(pthread_join(queue->device_thread, NULL) == 0);
    virtio_scsi_queue_destroy(queue->native);
    close(queue->kick);
    free(queue->ram);
}

static void put_command(struct queue *queue, unsigned slot, uint8_t lun, uint64_t tag)
{
    struct vring_desc *desc = (struct vring_desc *)queue->ram + 2 * slot;
    struct virtio_scsi_cmd_req *header =
        (struct virtio_scsi_cmd_req *)(queue->ram + HEADERS + slot * STRIDE);

    *header = (struct virtio_scsi_cmd_req){.lun = {1, 0, 0x40, lun}, .tag = tag};
    memset(queue->ram + RESPONSES + slot * STRIDE, UNTOUCHED, RESPONSE);
    desc[0] = (struct vring_desc){HEADERS + slot * STRIDE, REQUEST, VRING_DESC_F_NEXT,
                                  (uint16_t)(2 * slot + 1)};
    desc[1] = (struct vring_desc){RESPONSES + slot * STRIDE, RESPONSE, VRING_DESC_F_WRITE, 0};
}

/* Keeps as many commands in flight as there is room for, to LUN 0 and 1 by turns. */
static void *drive(void *argument)
{
    struct queue *queue = argument;
    struct vring_avail *avail = (struct vring_avail *)(queue->ram + AVAIL);
    struct vring_used *used = (struct vring_used *)(queue->ram + USED);
    unsigned free_slots[SLOTS], free_count = SLOTS, sent = 0, taken = 0;
    uint16_t used_idx = 0;

    for (unsigned i = 0; i < SLOTS; i++)
        free_slots[i] = i;
    while (taken < COMMANDS) {
        unsigned before = sent;

        while (free_count > 0 && sent < COMMANDS) {
            unsigned slot = free_slots[--free_count];

            put_command(queue, slot, sent & 1, sent);
            avail->ring[sent++ % QUEUE_SIZE] = (uint16_t)(2 * slot);
        }
        if (sent != before) {
            __atomic_store_n(&avail->idx, (uint16_t)sent, __ATOMIC_SEQ_CST);
            if (!(__atomic_load_n(&used->flags, __ATOMIC_SEQ_CST) & VRING_USED_F_NO_NOTIFY))
                eventfd_signal(queue->kick);
        }
        while (used_idx != __atomic_load_n(&used->idx, __ATOMIC_ACQUIRE)) {
            unsigned slot = used->ring[used_idx++ % QUEUE_SIZE].id / 2;
            const struct virtio_scsi_cmd_resp *response =
                (const struct virtio_scsi_cmd_resp *)(queue->ram + RESPONSES + slot * STRIDE);

            CHECK(response->response != UNTOUCHED); /* each comes back once */
            queue->answers[response->response]++;
            if (response->response == SCSI_DELIVERED)
                CHECK(response->status == SCSI_CONDITION_MET ||
                      response->status == SCSI_CHECK_CONDITION); /* no such LUN, or an attention */
            memset(queue->ram + RESPONSES + slot * STRIDE, UNTOUCHED, RESPONSE);
            free_slots[free_count++] = slot;
            taken++;
        }
    }
    __atomic_store_n(&queue->ended, true, __ATOMIC_RELAXED);
    return NULL;
}

static bool all_ended(struct queue *queues)
{
    for (unsigned i = 0; i < QUEUES; i++)
        if (!__atomic_load_n(&queues[i].ended, __ATOMIC_RELAXED))
            return false;
    return true;
}

/* --- functions ---------------------------------------------------------------------------------- */

static void await_function(const struct virtio_scsi_function *function)
{
    uint64_t count;

    while (__atomic_load_n(&function->pending, __ATOMIC_ACQUIRE) > 0) {
        struct pollfd done = {.fd = function->done_fd, .events = POLLIN};

        CHECK(poll(&done, 1, 10000) == 1); /* it does end */
    }
    CHECK(read(function->done_fd, &count, sizeof(count)) == sizeof(count));
}

static void perform(struct virtio_scsi_function *function, const struct queue *queues)
{
    struct virtio_scsi_queue *natives[QUEUES];

    for (unsigned i = 0; i < QUEUES; i++)
        natives[i] = queues[i].native;
    virtio_scsi_post(function, natives, QUEUES);
    await_function(function);
}

/* A unit comes and goes, and tasks of another are ended, while two drivers use both. */
static void test_units_go_while_they_are_used(enum blk_engine engine)
{
    struct slow_unit *first = create_unit();
    struct virtio_scsi_unit alone[] = {{0, &first->lun}};
    const struct virtio_scsi_map map_of_one = {1, alone};
    struct queue queues[QUEUES];
    pthread_t thread;
    int done_fd = eventfd(0, 0);
    unsigned ended = 0;

    slow_stop = false;
    CHECK(pthread_create(&thread, NULL, slow_thread, NULL) == 0);
    for (unsigned i = 0; i < QUEUES; i++) {
        open_queue(&queues[i], &map_of_one, engine);
        CHECK(pthread_create(&queues[i].driver_thread, NULL, drive, &queues[i]) == 0);
    }
    while (!all_ended(queues)) {
        struct slow_unit *second = create_unit();
        struct virtio_scsi_unit both[] = {{0, &first->lun}, {1, &second->lun}};
        const struct virtio_scsi_map map_of_two = {2, both};
        struct virtio_scsi_function plug = {
            .map = &map_of_two, .target = -1, .done_fd = done_fd};
        struct virtio_scsi_function abort_tasks = {
            .lun = &first->lun, .target = -1, .end = SCSI_ABORTED, .done_fd = done_fd};
        struct virtio_scsi_function unplug = {
            .map = &map_of_one, .lun = &second->lun, .target = -1, .end = SCSI_BAD_TARGET,
            .done_fd = done_fd};

        perform(&plug, queues);
        perform(&abort_tasks, queues);
        ended += abort_tasks.matched;
        perform(&unplug, queues);
        close_unit(second);
    }
    for (unsigned i = 0; i < QUEUES; i++) {
        CHECK(pthread_join(queues[i].driver_thread, NULL) == 0);
        close_queue(&queues[i]);
    }
    CHECK(ended > 0);
    CHECK(queues[0].answers[SCSI_ABORTED] + queues[1].answers[SCSI_ABORTED] == ended);
    CHECK(queues[0].answers[SCSI_DELIVERED] > COMMANDS / 4);
    pthread_mutex_lock(&slow_lock);
    slow_stop = true;
    pthread_cond_signal(&slow_changed);
    pthread_mutex_unlock(&slow_lock);
    CHECK(pthread_join(thread, NULL) == 0);
    close_unit(first);
    close(done_fd);
}

/* The queue stops while commands are on another thread: it waits for them, and cancels them. */
static void test_a_stop_waits(enum blk_engine engine)
{
    struct slow_unit *unit = create_unit();
    struct virtio_scsi_unit alone[] = {{0, &unit->lun}};
    const struct virtio_scsi_map map = {1, alone};
    struct queue queue;
    pthread_t thread;

    open_queue(&queue, &map, engine);
    put_command(&queue, 0, 0, 1);
    ((struct vring_avail *)(queue.ram + AVAIL))->ring[0] = 0;
    __atomic_store_n(&((struct vring_avail *)(queue.ram + AVAIL))->idx, 1, __ATOMIC_RELEASE);
    eventfd_signal(queue.kick);
    for (bool started = false; !started;) {
        pthread_mutex_lock(&slow_lock);
        started = slow_list;
        pthread_mutex_unlock(&slow_lock);
    }
    cancelled = 0;
    virtio_scsi_queue_stop(queue.native, true);
    while (__atomic_load_n(&cancelled, __ATOMIC_RELAXED) == 0)
        usleep(100);
    slow_stop = true; /* after what is in its list */
    CHECK(pthread_create(&thread, NULL, slow_thread, NULL) == 0);
    CHECK(pthread_join(queue.device_thread, NULL) == 0);
    CHECK(queue.ram[RESPONSES + 10] == SCSI_CONDITION_MET);
    CHECK(cancelled == 1);

    /* It can run again. */
    CHECK(pthread_create(&queue.device_thread, NULL, run_device, &queue) == 0);
    close_queue(&queue);
    CHECK(pthread_join(thread, NULL) == 0);
    close_unit(unit);
}

int main(void)
{
    const enum blk_engine engines[] = {BLK_ENGINE_SYNC, BLK_ENGINE_IO_URING};

    for (unsigned i = 0; i < 2; i++) {
        if (engines[i] == BLK_ENGINE_IO_URING && blk_io_uring_check() < 0) {
            printf("without io_uring\n");
            continue;
        }
        test_units_go_while_they_are_used(engines[i]);
        test_a_stop_waits(engines[i]);
    }
    return 0;
}
