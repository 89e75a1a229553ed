/* Fuzzes walk_calibration_decode: length and checksum are made right unless the first byte says
 * otherwise, since the writer of a file may be hostile. What is accepted must print to the same
 * bytes, and its rules must get stricter with recall and stay within the limits of a search. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "index/disk_search.h"
#include "index/walk_rule.h"
#include "tests/support/fuzz_support.h"

static void use(const struct walk_calibration *calibration)
{
    static const uint32_t ks[] = {1, 10, 77, 1000, SEARCH_LIST_MAX};

    for (uint32_t i = 0; i < 10; i++) {
        uint32_t k = ks[i / 2];
        struct walk_rule before = {.gain = INFINITY}, rule;
        float reads;

        for (uint32_t r = 1; r < 200; r++) {
            double recall = r < 100 ? r / 100.0 : 1 - pow(0.9, r - 100) / 100;

            walk_rule_for_recall(calibration, recall, k, i % 2, &rule, &reads);
            require(rule.search_list >= k && rule.search_list <= SEARCH_LIST_MAX &&
                        rule.cells <= DISK_SEARCH_CELLS_MAX && rule.gain >= 0 && reads >= 0,
                    "a rule out of range");
            require(rule.gain <= before.gain && rule.patience >= before.patience &&
                        rule.search_list >= before.search_list && rule.cells >= before.cells,
                    "a laxer rule for a higher recall");
            before = rule;
        }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    struct walk_calibration calibration;
    struct error err = ERROR_INIT;
    uint8_t *copy, *printed = NULL;
    size_t printed_bytes;

    if (bytes < 2)
        return 0;
    uint8_t mode = data[0];

    bytes--;
    copy = fuzz_copy(data + 1, bytes);
    if (!(mode & 1))
        fuzz_sign_length(copy, bytes);
    if (walk_calibration_decode(copy, bytes, "input", &calibration, &err) == 0) {
        use(&calibration);
        require(walk_calibration_encode(&calibration, &printed, &printed_bytes, &err) == 0,
                "print");
        require(printed_bytes == bytes && !memcmp(printed, copy, bytes), "prints differently");
        free(printed);
    } else {
        require(err.code == ERR_CORRUPT || err.code == ERR_UNSUPPORTED, "another error");
    }
    free(copy);
    return 0;
}
