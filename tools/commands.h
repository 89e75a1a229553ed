/* commands: what main.c dispatches to, one file each. */
#ifndef ANND_TOOLS_COMMANDS_H
#define ANND_TOOLS_COMMANDS_H

#include "tools/options.h"

extern const struct command command_attach;
extern const struct command command_bench;
extern const struct command command_build;
extern const struct command command_check;
extern const struct command command_discard;
extern const struct command command_doctor;
extern const struct command command_generate;
extern const struct command command_inspect;
extern const struct command command_plan;
extern const struct command command_resume;
extern const struct command command_search;
extern const struct command command_serve;
extern const struct command command_truth;

/* Exit codes, the same for every verb. */
enum exit_code {
    EXIT_DONE = 0,
    EXIT_FAILED = 1,
    EXIT_USAGE = 2,
    EXIT_MISSING = 3,
    EXIT_DAMAGE = 4,
    EXIT_REFUSED = 5, /* would exceed memory, disk or time */
    EXIT_UNREACHABLE = 6,
    EXIT_BUSY = 9,
    EXIT_INTERRUPTED = 75
};

#endif
