/* build_record: what `annd build` was asked for, as the build.job of its journal keeps it and
 * `annd resume` reads it back.
 *
 * Every option is kept as the text the user gave (or the default of that day) under option.NAME,
 * files by absolute path with the size and time of change they had; file.input.* is INPUT. */
#ifndef ANND_TOOLS_BUILD_RECORD_H
#define ANND_TOOLS_BUILD_RECORD_H

#include "storage/manifest.h"
#include "tools/options.h"

/* `arguments` are those of annd build, memory_bytes what it was granted. *out ends with
 * manifest_free(). ERR_NOT_FOUND and so on name the file that cannot be looked at. */
int build_record_make(const struct arguments *arguments, uint64_t memory_bytes,
                      struct manifest **out, struct error *err);
/* Arguments as if the user had given them again; they borrow from the record. `where` names it in
 * errors. ERR_CORRUPT; ERR_UNSUPPORTED when another version of annd wrote it. */
int build_record_read(const struct manifest *record, const char *where, struct arguments *out,
                      struct error *err);
/* ERR_INVALID naming the first file that is not what it was, ERR_NOT_FOUND when it is gone. */
int build_record_check(const struct manifest *record, struct error *err);

#endif
