/* What a fuzzer is given, taken byte by byte; after its end there are zeroes. */
#ifndef PYVMM_TESTS_FUZZ_INPUT_H
#define PYVMM_TESTS_FUZZ_INPUT_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

struct input {
    const uint8_t *data;
    size_t size;
};

/* The next `size` bytes, at most 8, as a number. */
static inline uint64_t take(struct input *input, size_t size)
{
    uint64_t value = 0;

    if (size > input->size)
        size = input->size;
    memcpy(&value, input->data, size);
    input->data += size;
    input->size -= size;
    return value;
}

#endif
