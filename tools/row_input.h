/* row_input: the keys and attributes files of `annd build`, made ready for segment_build.
 *
 * Keys stay in memory (8 bytes a row, or their text); attributes are converted once, line by line,
 * into records in an unlinked scratch file beside the output, with 12 bytes a row in memory. */
#ifndef ANND_TOOLS_ROW_INPUT_H
#define ANND_TOOLS_ROW_INPUT_H

#include <stdbool.h>

#include "index/segment_build.h"

struct row_input_files {
    const char *keys;       /* text, one a line, or a 1-D integer .npy; NULL: row numbers */
    const char *attributes; /* JSON object a line; NULL: none */
    const char *schema;     /* NULL: default schema */
    const char *key_field;
    const char *vector_field;
};

struct row_input {
    struct schema *schema;
    int64_t *int64_keys;
    char **text_keys;
    char *text; /* what text_keys point into */
    struct scratch *scratch;
    uint64_t memory_bytes;
    struct segment_build_rows rows; /* for segment_build */
};

/* rows and dim, type: of the vector input. `folder` takes the scratch file. ERR_INVALID names file,
 * line and field. *out ends with row_input_release, also on failure. */
int row_input_open(const struct row_input_files *files, uint64_t rows, uint32_t dim,
                   enum element_type type, const char *folder, struct job *job,
                   struct row_input *out, struct error *err);
void row_input_release(struct row_input *input);

#endif
