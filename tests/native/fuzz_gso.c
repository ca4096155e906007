/* Fuzzes the completion of frames: the input is a message. Each frame that is emitted must lie in
 * memory (AddressSanitizer), be complete, be no longer than the message, and say in sum as much. */
#include <linux/virtio_net.h>
#include <string.h>

#include "check.h"
#include "net_gso.h"

#define HEADER sizeof(struct virtio_net_hdr_v1)

struct seen {
    size_t longest, frames, bytes;
};

static void emit(void *opaque, const uint8_t *message, size_t size)
{
    struct seen *seen = opaque;
    uint8_t *copy = malloc(size);

    CHECK(copy && size >= HEADER && size <= seen->longest);
    memcpy(copy, message, size);
    CHECK(net_gso_takes(0, copy));
    free(copy);
    seen->frames++;
    seen->bytes += size;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    uint8_t *message = malloc(size ? size : 1);
    struct seen seen = {size, 0, 0};

    CHECK(message);
    memcpy(message, data, size);
    if (size >= HEADER)
        net_gso_takes(0x0f, message);
    if (net_gso_complete(message, size, emit, &seen))
        CHECK(seen.frames >= 1 && seen.frames <= 1024 && seen.bytes >= size);
    else
        CHECK(seen.frames == 0);
    free(message);
    return 0;
}
