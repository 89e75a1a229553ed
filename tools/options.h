/* options: one table per command drives parsing, checking and `--help`, so they cannot drift. */
#ifndef ANND_TOOLS_OPTIONS_H
#define ANND_TOOLS_OPTIONS_H

#include <stdbool.h>
#include <stdint.h>

#include "storage/base/error.h"

enum option_kind {
    OPTION_FLAG, /* no argument */
    OPTION_TEXT,
    OPTION_NUMBER, /* unsigned, decimal */
    OPTION_SIZE,   /* bytes: 512, 64M, 2GiB; K, M, G, T are powers of 1024 */
    OPTION_REAL
};

struct option {
    const char *name; /* "search-list"; a one-letter name is written -k */
    enum option_kind kind;
    const char *argument; /* "N", "FILE"; NULL for flags */
    const char *initial;  /* default value as text, or NULL: absent */
    const char *choices;  /* "a|b|c", or NULL */
    const char *help;
    uint64_t min, max; /* of numbers and sizes; both 0: any */
};

#define OPTIONS_MAX 32u
#define POSITIONAL_MAX 2u

struct arguments {
    const struct command *command;
    const char *values[OPTIONS_MAX]; /* as given, else the default, else NULL */
    bool given[OPTIONS_MAX];
    const char *positional[POSITIONAL_MAX];
    uint32_t positional_count;
};

struct command {
    const char *name;
    const char *positional; /* "INPUT"; one word an argument, all required; "" for none */
    const char *summary;
    const char *examples;                                             /* two lines or so */
    const struct option *options;                                     /* ends with a NULL name */
    int (*run)(const struct arguments *arguments, struct error *err); /* 0, -1, or an exit code */
};

/* ERR_INVALID with a "did you mean" where a name is near. *help is set when --help was given. */
int options_parse(const struct command *command, int argc, char **argv, struct arguments *out,
                  bool *help, struct error *err);
void options_print_help(const struct command *command);
/* The name among `names` (NULL-terminated) nearest to `text`, or NULL when none is near. */
const char *options_nearest(const char *text, const char *const *names);

bool option_given(const struct arguments *arguments, const char *name);
bool option_flag(const struct arguments *arguments, const char *name);
/* NULL when absent and without default. */
const char *option_text(const struct arguments *arguments, const char *name);
/* 0 when absent and without default. Syntax and range were checked by options_parse. */
uint64_t option_u64(const struct arguments *arguments, const char *name);
uint32_t option_u32(const struct arguments *arguments, const char *name);
double option_real(const struct arguments *arguments, const char *name);
/* "16,24,32" to numbers; ERR_INVALID naming the piece. *count in: room, out: how many. */
int option_list(const struct arguments *arguments, const char *name, uint32_t min, uint32_t max,
                uint32_t *out, uint32_t *count, struct error *err);
int option_size_parse(const char *text, uint64_t *bytes);

#endif
