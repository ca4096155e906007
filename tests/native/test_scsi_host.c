/* Pass-through to a SCSI device of the host, under sanitizers. The host is played here: `ioctl` is
 * wrapped by the linker, and each SG_IO does what its opcode says below. */
#include <errno.h>
#include <poll.h>
#include <scsi/sg.h>
#include <semaphore.h>
#include <stdarg.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "check.h"
#include "scsi_host.h"
#include "worker.h"

enum {
    ECHO = 0x28,     /* READ(10): data-in counts up from byte 2 of the CDB */
    TAKE = 0x2A,     /* WRITE(10): checks that data-out does so */
    SHORT = 0x12,    /* INQUIRY: standard data, or page B0h */
    FAULTY = 0x2F,   /* a CHECK CONDITION with 20 bytes of sense, after 512 bytes */
    HANG = 0x35,     /* does not end before somebody lets it, by sem_post or a reset */
    REFUSED = 0x41,  /* fails with the errno in byte 2 */
    BROKEN = 0x42,   /* fails with the host_status in byte 2 */
};

static sem_t let_go;
static int running, resets;
static pthread_mutex_t last_lock = PTHREAD_MUTEX_INITIALIZER;
static struct sg_io_hdr last; /* of the commands that do not hang */
static uint8_t last_cdb[SCSI_CDB_MAX];

static int play(struct sg_io_hdr *header)
{
    const uint8_t *cdb = header->cmdp;
    uint8_t *data = header->dxferp;

    switch (cdb[0]) {
    case ECHO:
        CHECK(header->dxfer_direction == SG_DXFER_FROM_DEV);
        CHECK((uintptr_t)data % 4096 == 0);
        for (uint32_t i = 0; i < header->dxfer_len; i++)
            data[i] = (uint8_t)(cdb[2] + i);
        break;
    case TAKE:
        CHECK(header->dxfer_direction == SG_DXFER_TO_DEV);
        for (uint32_t i = 0; i < header->dxfer_len; i++)
            CHECK(data[i] == (uint8_t)(cdb[2] + i));
        break;
    case SHORT: {
        uint8_t answer[64] = {0, cdb[2], 0, 60, 0, 0xFF};

        memset(answer + 8, 0x7F, 8);
        if (header->dxfer_len > sizeof(answer))
            header->resid = (int)(header->dxfer_len - sizeof(answer));
        memcpy(data, answer, header->dxfer_len - (uint32_t)header->resid);
        break;
    }
    case FAULTY:
        header->status = SCSI_CHECK_CONDITION;
        header->driver_status = 8;
        header->host_status = cdb[2];
        header->resid = (int)header->dxfer_len - 512;
        header->sb_len_wr = 20;
        memset(header->sbp, 0x5A, 20);
        memset(data, 0x11, 512);
        break;
    case HANG:
        __atomic_add_fetch(&running, 1, __ATOMIC_SEQ_CST);
        while (sem_wait(&let_go) < 0)
            ;
        __atomic_sub_fetch(&running, 1, __ATOMIC_SEQ_CST);
        if (data)
            memset(data, 0xDD, header->dxfer_len);
        return 0;
    case REFUSED:
        errno = cdb[2];
        return -1;
    case BROKEN:
        header->host_status = cdb[2];
        break;
    }
    pthread_mutex_lock(&last_lock);
    last = *header;
    memcpy(last_cdb, cdb, header->cmd_len);
    pthread_mutex_unlock(&last_lock);
    return 0;
}

int __wrap_ioctl(int fd, unsigned long request, ...);
int __wrap_ioctl(int fd, unsigned long request, ...)
{
    va_list arguments;
    void *argument;

    va_start(arguments, request);
    argument = va_arg(arguments, void *);
    va_end(arguments);
    CHECK(fd >= 0);
    if (request == SG_IO)
        return play(argument);
    CHECK(request == SG_SCSI_RESET);
    CHECK(*(int *)argument == 0x101); /* the device, and nothing beyond */
    __atomic_add_fetch(&resets, 1, __ATOMIC_SEQ_CST);
    for (int n = __atomic_load_n(&running, __ATOMIC_SEQ_CST); n > 0; n--)
        sem_post(&let_go);
    return 0;
}

/* --- a front end ---------------------------------------------------------------------------- */

struct rig {
    struct scsi_host *host;
    struct scsi_worker worker;
    int wake;
    unsigned ended;
};

static struct rig rig;

static void ended(struct scsi_command *command)
{
    CHECK(!command->private_data); /* once */
    command->private_data = &rig;
    rig.ended++;
}

static void begin(void)
{
    int fd = eventfd(0, EFD_CLOEXEC);

    rig = (struct rig){.wake = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)};
    rig.host = scsi_host_create(fd, &(struct scsi_pass_limits){64 << 10, 512});
    CHECK(rig.host && scsi_worker_init(&rig.worker, rig.wake) == 0);
    close(fd); /* it has its own */
    resets = 0;
}

static void finish(void)
{
    scsi_host_destroy(rig.host);
    scsi_worker_destroy(&rig.worker);
    close(rig.wake);
}

static void collect(void)
{
    struct pollfd wait = {.fd = rig.wake, .events = POLLIN};

    CHECK(poll(&wait, 1, 10000) == 1);
    eventfd_take(rig.wake);
    for (struct scsi_command *next, *command = scsi_worker_take(&rig.worker); command;
         command = next) {
        next = command->next;
        scsi_done(command);
    }
}

static void start(struct scsi_command *command)
{
    command->worker = &rig.worker;
    command->lun = scsi_host_lun(rig.host);
    command->cdb_size = 32;
    command->done = ended;
    scsi_execute(command);
}

static void execute(struct scsi_command *command)
{
    unsigned before = rig.ended;

    start(command);
    while (rig.ended == before)
        collect();
}

static void await_running(int count)
{
    while (__atomic_load_n(&running, __ATOMIC_SEQ_CST) != count)
        usleep(1000);
}

/* --- what passes ------------------------------------------------------------------------------ */

static void test_data_passes_both_ways_in_any_pieces(void)
{
    static const size_t cuts[] = {1, 511, 4096, 7, 3577};
    uint8_t data[8192];
    struct iovec iov[5];

    begin();
    for (int way = 0; way < 2; way++) {
        struct scsi_command command = {.cdb = {way ? TAKE : ECHO, 0, 7}};
        struct scsi_data pieces = {iov, 5, sizeof(data)};
        size_t at = 0;

        for (int i = 0; i < 5; i++) {
            iov[i] = (struct iovec){data + at, cuts[i]};
            at += cuts[i];
        }
        CHECK(at == sizeof(data));
        if (way)
            command.out = pieces;
        else
            command.in = pieces;
        execute(&command);
        CHECK(command.delivery == SCSI_DELIVERED && command.status == SCSI_GOOD);
        CHECK(command.transferred == sizeof(data) && command.sense_size == 0);
        for (size_t i = 0; i < sizeof(data); i++)
            CHECK(data[i] == (uint8_t)(7 + i));
        CHECK(last.cmd_len == 10 && last.timeout == 30000);
    }
    finish();
}

static void test_status_sense_and_residual_pass(void)
{
    uint8_t data[2048] = {0};
    struct iovec iov = {data, sizeof(data)};

    begin();
    /* The kernel may say of a status in host_status, too, how it would read it. */
    for (uint8_t host_status = 0; host_status <= 0x10; host_status += 0x10) {
        struct scsi_command command = {.cdb = {FAULTY, 0, host_status}, .in = {&iov, 1, 2048}};

        execute(&command);
        CHECK(command.delivery == SCSI_DELIVERED && command.status == SCSI_CHECK_CONDITION);
        CHECK(command.transferred == 512 && command.sense_size == 20);
        CHECK(command.sense[0] == 0x5A && command.sense[19] == 0x5A && command.sense[20] == 0);
        CHECK(data[511] == 0x11 && data[512] == 0);
        CHECK(last.timeout == 24u * 3600 * 1000);
    }
    finish();
}

static void test_inquiry_tells_of_what_changes_on_the_way(void)
{
    uint8_t data[255] = {0};
    struct iovec iov = {data, sizeof(data)};
    struct scsi_command standard = {.cdb = {SHORT, 0, 0, 0, 255}, .in = {&iov, 1, 255}};
    struct scsi_command limits = {.cdb = {SHORT, 1, 0xB0, 0, 255}, .in = {&iov, 1, 255}};

    begin();
    execute(&standard);
    CHECK(standard.transferred == 64 && data[5] == 0xF7 && data[8] == 0x7F);
    execute(&limits);
    CHECK(limits.transferred == 64 && data[5] == 0xFF);
    CHECK(scsi_be32(data + 8) == 128 && scsi_be32(data + 12) == 128);
    finish();
}

static void test_pages_are_patched_where_they_have_the_field(void)
{
    const struct scsi_pass_limits limits = {64 << 10, 512}, none = {0, 512}, tape = {64 << 10, 0};
    const uint8_t b0[] = {0x12, 1, 0xB0, 0, 255}, b1[] = {0x12, 1, 0xB1, 0, 255};
    uint8_t page[16] = {0, 0xB0, 0, 60}, copy[16];

    memcpy(copy, page, 16);
    scsi_pass_patch(&limits, b1, page, 16);
    scsi_pass_patch(&none, b0, page, 16);
    scsi_pass_patch(&tape, b0, page, 16);
    scsi_pass_patch(&limits, b0, page, 11);
    CHECK(memcmp(page, copy, 16) == 0);
    page[0] = 1; /* of a tape, which uses them otherwise */
    scsi_pass_patch(&limits, b0, page, 16);
    CHECK(scsi_be32(page + 8) == 0);
    page[0] = 0;
    scsi_pass_patch(&limits, b0, page, 16);
    CHECK(scsi_be32(page + 8) == 128 && scsi_be32(page + 12) == 0);
    scsi_put_be32(page + 8, 64); /* the device's own limits are lower */
    scsi_put_be32(page + 12, 32);
    scsi_pass_patch(&limits, b0, page, 16);
    CHECK(scsi_be32(page + 8) == 64 && scsi_be32(page + 12) == 32);
}

static void test_sizes_of_cdbs(void)
{
    uint8_t cdb[SCSI_CDB_MAX] = {0};
    static const struct {
        uint8_t opcode, size;
    } known[] = {{0x00, 6}, {0x1F, 6}, {0x28, 10}, {0x5A, 10}, {0x88, 16}, {0xA8, 12}, {0xC1, 10}};

    for (size_t i = 0; i < sizeof(known) / sizeof(known[0]); i++) {
        cdb[0] = known[i].opcode;
        CHECK(scsi_pass_cdb_size(cdb) == known[i].size);
    }
    cdb[0] = 0x7F;
    cdb[7] = 0x18;
    CHECK(scsi_pass_cdb_size(cdb) == 32);
    cdb[0] = 0xE7; /* of a vendor */
    cdb[11] = 1;
    CHECK(scsi_pass_cdb_size(cdb) == 12);
    cdb[15] = 1;
    CHECK(scsi_pass_cdb_size(cdb) == 16);
}

static void test_any_cdb(void)
{
    const struct scsi_pass_limits limits = {64 << 10, 512};

    for (unsigned round = 0; round < 300000; round++) {
        uint8_t *data = malloc(round % 32);
        struct scsi_command command = {.cdb_size = round % 40};

        for (unsigned i = 0; i < 32; i++)
            command.cdb[i] = (uint8_t)rand();
        command.cdb[0] = (uint8_t)round;
        for (unsigned i = 0; i < round % 32; i++)
            data[i] = (uint8_t)rand();
        if (!scsi_pass_refuses(&command) && command.cdb[0] == 0x7F)
            CHECK(scsi_pass_cdb_size(command.cdb) <= command.cdb_size);
        CHECK(scsi_pass_cdb_size(command.cdb) <= SCSI_CDB_MAX + 3);
        CHECK(scsi_pass_timeout(command.cdb) >= 30);
        scsi_pass_patch(&limits, command.cdb, data, round % 32); /* AddressSanitizer looks */
        free(data);
    }
}

/* --- what does not ---------------------------------------------------------------------------- */

static void test_what_reaches_beyond_the_device_is_refused(void)
{
    static const struct {
        uint8_t cdb[32];
        int byte; /* that the sense data point to; -1: the opcode is unknown, 0: nothing */
    } cases[] = {
        {{0x83, 0x11}, -1},
        {{0x84}, -1},
        {{0x3B, 0x05}, 1},
        {{0x3B, 0xEF}, 1},
        {{0x3B, 0x02}, 0},
        {{0x3B, 0x0A}, 0},
        {{0xA1, [9] = 0x92}, 9},
        {{0xA1, [9] = 0xEC}, 0},
        {{0x85, [14] = 0x93}, 14},
        {{0x85, [14] = 0xF4}, 0},
        {{0x7F, [7] = 0x18, [8] = 0x1F, [9] = 0xF0, [25] = 0x92}, 25},
        {{0x7F, [7] = 0x18, [8] = 0x1F, [9] = 0xF0, [25] = 0xEC}, 0},
        {{0x7F, [7] = 0x19}, 7},
        {{0x04}, 0},
        {{0xB5}, 0},
        {{0x5F, 0x03}, 0},
        {{0xFF}, 0},
    };

    begin();
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct scsi_command command = {0};

        memcpy(command.cdb, cases[i].cdb, 32);
        last_cdb[0] = 0x99;
        execute(&command);
        CHECK(command.delivery == SCSI_DELIVERED);
        CHECK((command.status == SCSI_GOOD) == (cases[i].byte == 0));
        CHECK((last_cdb[0] == command.cdb[0]) == (cases[i].byte == 0));
        if (cases[i].byte < 0)
            CHECK(command.sense[2] == 5 && command.sense[12] == 0x20);
        if (cases[i].byte > 0)
            CHECK(command.sense[12] == 0x24 && scsi_be16(command.sense + 16) == cases[i].byte);
    }
    finish();
}

static void test_a_cdb_that_no_host_takes(void)
{
    struct scsi_command command = {.cdb = {0x7F, [7] = 252}};

    begin();
    command.worker = &rig.worker;
    command.lun = scsi_host_lun(rig.host);
    command.cdb_size = SCSI_CDB_MAX;
    command.done = ended;
    scsi_execute(&command);
    CHECK(command.private_data && command.status == SCSI_CHECK_CONDITION);
    CHECK(command.sense[12] == 0x24);
    finish();
}

static void test_a_transfer_that_no_host_takes_costs_no_memory(void)
{
    uint8_t byte;
    struct iovec iov = {&byte, 1};
    struct scsi_command in = {.cdb = {ECHO}, .in = {&iov, 1, SCSI_PASS_MAX_BYTES + 1}};
    struct scsi_command out = {.cdb = {TAKE}, .out = {&iov, 1, UINT32_MAX}};

    begin();
    execute(&in);
    execute(&out);
    CHECK(in.status == SCSI_CHECK_CONDITION && in.sense[12] == 0x24);
    CHECK(out.status == SCSI_CHECK_CONDITION && out.sense[12] == 0x24);
    finish();
}

static void test_failures_of_the_host(void)
{
    static const struct {
        uint8_t opcode, code, delivery, asc;
    } cases[] = {
        {REFUSED, EPERM, SCSI_DELIVERED, 0x20}, {REFUSED, EINVAL, SCSI_DELIVERED, 0x24},
        {REFUSED, ENODEV, SCSI_BAD_TARGET, 0},  {REFUSED, EDOM, SCSI_QUEUE_BUSY, 0},
        {REFUSED, ENOMEM, SCSI_QUEUE_BUSY, 0},  {REFUSED, EIO, SCSI_FAILURE, 0},
        {BROKEN, 0x01, SCSI_BAD_TARGET, 0},     {BROKEN, 0x02, SCSI_QUEUE_BUSY, 0},
        {BROKEN, 0x03, SCSI_TRANSPORT_FAILURE, 0}, {BROKEN, 0x07, SCSI_FAILURE, 0},
        {BROKEN, 0x08, SCSI_RESET, 0},          {BROKEN, 0x0E, SCSI_TRANSPORT_FAILURE, 0},
        {BROKEN, 0x77, SCSI_FAILURE, 0},
    };

    begin();
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct scsi_command command = {.cdb = {cases[i].opcode, 0, cases[i].code}};

        execute(&command);
        CHECK(command.delivery == cases[i].delivery);
        CHECK(command.status == (cases[i].asc ? SCSI_CHECK_CONDITION : SCSI_GOOD));
        CHECK(!cases[i].asc || (command.sense[2] == 5 && command.sense[12] == cases[i].asc));
    }
    finish();
}

/* --- many at once, and their ends -------------------------------------------------------------- */

static void test_nothing_holds_up_others(void)
{
    enum { HELD = SCSI_HOST_THREADS - 1 };
    struct scsi_command held[HELD] = {0}, quick = {0};

    begin();
    for (int i = 0; i < HELD; i++) {
        held[i].cdb[0] = HANG;
        start(&held[i]);
    }
    for (int i = 0; i < 100; i++) {
        quick = (struct scsi_command){.cdb = {0x00}};
        execute(&quick);
        CHECK(quick.status == SCSI_GOOD);
    }
    await_running(HELD);
    for (int i = 0; i < HELD; i++)
        sem_post(&let_go);
    while (rig.ended < HELD + 100)
        collect();
    CHECK(scsi_host_counters(rig.host).commands == HELD + 100);
    finish();
}

static void test_a_cancelled_command_ends_at_once_and_its_data_stay_away(void)
{
    enum { MORE = SCSI_HOST_THREADS + 5 };
    uint8_t data[MORE][512];
    struct iovec iov[MORE];
    struct scsi_command commands[MORE] = {0}, after = {.cdb = {0x00}};
    struct scsi_lun *lun;

    begin();
    lun = scsi_host_lun(rig.host);
    memset(data, 0x33, sizeof(data));
    for (int i = 0; i < MORE; i++) {
        iov[i] = (struct iovec){data[i], 512};
        commands[i].cdb[0] = HANG;
        commands[i].in = (struct scsi_data){&iov[i], 1, 512};
        start(&commands[i]);
    }
    await_running(SCSI_HOST_THREADS);
    for (int i = MORE - 1; i >= 0; i--) { /* first some that wait for a thread */
        lun->ops->cancel(lun, &commands[i]);
        CHECK(commands[i].private_data && commands[i].delivery == SCSI_ABORTED);
    }
    CHECK(scsi_host_counters(rig.host).held == SCSI_HOST_THREADS);
    CHECK(scsi_host_counters(rig.host).cancelled == SCSI_HOST_THREADS);
    lun->ops->cancel(lun, &commands[0]); /* it has ended: nothing happens */

    /* All threads are lost to the device, which a reset makes give them back. */
    start(&after);
    CHECK(!after.private_data && resets == 0);
    lun->ops->reset(lun);
    while (!after.private_data)
        collect();
    CHECK(after.status == SCSI_GOOD && resets == 1);
    while (scsi_host_counters(rig.host).held > 0)
        usleep(1000);
    for (int i = 0; i < MORE; i++)
        for (int j = 0; j < 512; j++)
            CHECK(data[i][j] == 0x33);
    lun->ops->reset(lun); /* there is nothing to abort */
    CHECK(scsi_host_counters(rig.host).resets == 1);
    finish();
}

static void test_a_cancelled_write_ends_when_the_host_has_ended_it(void)
{
    uint8_t data[512];
    struct iovec iov = {data, 512};

    begin();
    for (int slow = 0; slow < 2; slow++) {
        struct scsi_command command = {.cdb = {HANG}, .out = {&iov, 1, 512}};
        struct scsi_command other = {.cdb = {0x00}};
        struct scsi_lun *lun = scsi_host_lun(rig.host);

        start(&command);
        await_running(1);
        lun->ops->cancel(lun, &command);
        execute(&other); /* meanwhile nothing waits */
        CHECK(!command.private_data && scsi_host_counters(rig.host).held == 1);
        if (!slow)
            sem_post(&let_go);
        while (!command.private_data)
            collect();
        CHECK(command.delivery == SCSI_ABORTED);
        CHECK(resets == slow && scsi_host_counters(rig.host).held == 0);
    }
    finish();
}

/* Cancelling while commands end by themselves: each ends once, whoever is first. */
static void test_cancelling_what_is_about_to_end(void)
{
    enum { ROUNDS = 2000, AT_ONCE = 4 };
    uint8_t data[AT_ONCE][2048];
    struct iovec iov[AT_ONCE];
    unsigned aborted = 0;

    begin();
    for (int round = 0; round < ROUNDS; round++) {
        struct scsi_command commands[AT_ONCE] = {0};
        struct scsi_lun *lun = scsi_host_lun(rig.host);
        unsigned before = rig.ended;

        for (int i = 0; i < AT_ONCE; i++) {
            iov[i] = (struct iovec){data[i], 2048};
            commands[i].cdb[0] = ECHO;
            commands[i].in = (struct scsi_data){&iov[i], 1, 2048};
            start(&commands[i]);
        }
        for (volatile int delay = 0; delay < round % 500 * 20; delay++)
            ;
        for (int i = 0; i < AT_ONCE; i++)
            if (!commands[i].private_data)
                lun->ops->cancel(lun, &commands[i]);
        while (rig.ended < before + AT_ONCE)
            collect();
        for (int i = 0; i < AT_ONCE; i++)
            aborted += commands[i].delivery == SCSI_ABORTED;
    }
    CHECK(aborted > 0 && aborted < ROUNDS * AT_ONCE); /* the race was one */
    CHECK(scsi_host_counters(rig.host).commands == ROUNDS * AT_ONCE);
    finish();
}

static void test_a_device_that_hangs_does_not_delay_the_end(void)
{
    uint8_t data[512];
    struct iovec iov = {data, 512};
    struct scsi_command command = {.cdb = {HANG}, .in = {&iov, 1, 512}};
    struct scsi_lun *lun;

    begin();
    lun = scsi_host_lun(rig.host);
    start(&command);
    await_running(1);
    lun->ops->cancel(lun, &command);
    CHECK(command.delivery == SCSI_ABORTED);
    finish();
    CHECK(__atomic_load_n(&running, __ATOMIC_SEQ_CST) == 1);
    sem_post(&let_go);
    await_running(0);
    usleep(50000); /* its thread frees what is left: LeakSanitizer looks */
}

static void test_query(void)
{
    uint8_t data[255];
    static const uint8_t inquiry[] = {SHORT, 0, 0, 0, 255, 0}, faulty[10] = {FAULTY};
    static const uint8_t refused[10] = {REFUSED, 0, ENOTTY};
    uint8_t large[512];

    CHECK(scsi_host_query(0, inquiry, 6, data, sizeof(data)) == 64);
    CHECK(scsi_host_query(0, faulty, 10, large, sizeof(large)) == -EIO);
    CHECK(scsi_host_query(0, refused, 10, data, sizeof(data)) == -ENOTTY);
}

int main(void)
{
    CHECK(sem_init(&let_go, 0, 0) == 0);
    test_data_passes_both_ways_in_any_pieces();
    test_status_sense_and_residual_pass();
    test_inquiry_tells_of_what_changes_on_the_way();
    test_pages_are_patched_where_they_have_the_field();
    test_sizes_of_cdbs();
    test_any_cdb();
    test_what_reaches_beyond_the_device_is_refused();
    test_a_cdb_that_no_host_takes();
    test_a_transfer_that_no_host_takes_costs_no_memory();
    test_failures_of_the_host();
    test_nothing_holds_up_others();
    test_a_cancelled_command_ends_at_once_and_its_data_stay_away();
    test_a_cancelled_write_ends_when_the_host_has_ended_it();
    test_cancelling_what_is_about_to_end();
    test_a_device_that_hangs_does_not_delay_the_end();
    test_query();
    return 0;
}
