/* CHECK ends a test with a message when something is not as it should be. */
#ifndef PYVMM_TESTS_CHECK_H
#define PYVMM_TESTS_CHECK_H

#include <stdio.h>
#include <stdlib.h>

#define CHECK(condition)                                                                      \
    do {                                                                                      \
        if (!(condition)) {                                                                   \
            fprintf(stderr, "%s:%d: %s: not true: %s\n", __FILE__, __LINE__, __func__,        \
                    #condition);                                                              \
            abort();                                                                          \
        }                                                                                     \
    } while (0)

#endif
