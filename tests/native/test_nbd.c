/* The NBD client under sanitizers, with a server (qemu-nbd) that is killed in the middle and comes
 * back. What must hold: each request is done once, and what the server has is what was written. The
 * rest is tests/unit/test_nbd.py. */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "blk_io.h"
#include "blk_nbd.h"
#include "check.h"

enum { DEPTH = 32, PART = 64 << 10, SIZE = DEPTH * PART };

static char directory[] = "/tmp/pyvmm-nbd-XXXXXX";
static char image_path[64], socket_path[64], uri[128];

static pid_t start_server(void)
{
    pid_t pid = fork();

    CHECK(pid >= 0);
    if (pid == 0) {
        execlp("qemu-nbd", "qemu-nbd", "--persistent", "--shared=0", "--format=raw", "--socket",
               socket_path, image_path, NULL);
        _exit(127);
    }
    for (int i = 0; access(socket_path, F_OK) < 0; i++) {
        CHECK(i < 1000);
        usleep(10000);
    }
    return pid;
}

static void kill_server(pid_t pid)
{
    kill(pid, SIGKILL);
    CHECK(waitpid(pid, NULL, 0) == pid);
    unlink(socket_path);
}

static unsigned ended, failed;

static void count_done(struct blk_request *request, int error)
{
    (void)request;
    ended++;
    failed += error != 0;
}

/* Each request has a part of the image of its own: as written, all of it has one value. */
static void submit(struct blk_io *io, struct blk_image *image, unsigned index, bool write, int value)
{
    static uint8_t data[DEPTH][PART];
    static struct iovec iov[DEPTH][3];
    static struct blk_request requests[DEPTH];
    size_t cut = (size_t)rand() % PART;

    if (write)
        memset(data[index], value, PART);
    iov[index][0] = (struct iovec){data[index], cut};
    iov[index][1] = (struct iovec){data[index] + cut, PART - cut};
    requests[index] = (struct blk_request){
        .image = image,
        .op = write ? BLK_WRITE : BLK_READ,
        .stable = index % 2,
        .offset = (uint64_t)index * PART,
        .iov = iov[index],
        .iov_count = 2,
        .done = count_done,
    };
    blk_io_submit(io, &requests[index]);
}

static void test_a_server_that_goes_and_comes(enum blk_engine engine)
{
    pid_t server = start_server();
    struct blk_nbd_info info;
    char error[256];
    struct blk_nbd *nbd = blk_nbd_open(uri, 5000, &info, error, sizeof(error));
    struct blk_image image = {
        .fd = -1, .size = SIZE, .block_size = 512, .buffer_align = 1, .one_buffer = true};
    struct blk_io *io = blk_io_create(engine, DEPTH);

    CHECK(io && nbd && info.size == SIZE && info.multi_conn && info.fua);
    image.remote = blk_nbd_remote(nbd);
    for (int round = 0; round < 6; round++) {
        ended = failed = 0;
        for (unsigned i = 0; i < DEPTH; i++) {
            submit(io, &image, i, i % 4 != 3, round + 1);
            if (round % 2 && i == DEPTH / 2)
                kill_server(server);
        }
        while (blk_io_in_flight(io) > 0)
            CHECK(blk_io_wait(io, true) == 0);
        CHECK(ended == DEPTH && (failed > 0) == round % 2);
        if (round % 2) {
            server = start_server();
            usleep((BLK_NBD_RETRY_MS + 100) * 1000);
        } else {
            uint8_t check[PART];
            FILE *file = fopen(image_path, "rb");

            CHECK(file);
            for (unsigned i = 0; i < DEPTH; i++) {
                CHECK(fread(check, PART, 1, file) == 1);
                for (size_t at = 0; i % 4 != 3 && at < PART; at++)
                    CHECK(check[at] == round + 1);
            }
            fclose(file);
        }
    }
    if (engine == BLK_ENGINE_SYNC) { /* either may go first */
        blk_io_destroy(io);
        blk_nbd_close(nbd);
    } else {
        blk_nbd_close(nbd);
        blk_io_destroy(io);
    }
    kill_server(server);
}

int main(void)
{
    FILE *file;

    if (system("qemu-nbd --version >/dev/null 2>&1") != 0) {
        printf("skipped: qemu-nbd is not installed (apt install qemu-utils)\n");
        return 0;
    }
    CHECK(mkdtemp(directory));
    snprintf(image_path, sizeof(image_path), "%s/image", directory);
    snprintf(socket_path, sizeof(socket_path), "%s/socket", directory);
    snprintf(uri, sizeof(uri), "nbd+unix:///?socket=%s", socket_path);
    file = fopen(image_path, "wb");
    CHECK(file && ftruncate(fileno(file), SIZE) == 0 && fclose(file) == 0);
    for (int engine = blk_io_uring_check() < 0 ? BLK_ENGINE_SYNC : BLK_ENGINE_IO_URING;
         engine <= BLK_ENGINE_SYNC; engine++)
        test_a_server_that_goes_and_comes(engine);
    unlink(image_path);
    rmdir(directory);
    return 0;
}
