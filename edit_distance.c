/* Minimum edit scripts between int32 token sequences, 64 cells of the table per machine operation.

   The table.  D[i][j] is the distance between the suffixes noisy[i:] and clean[j:], so D[0][0] is the answer:

       D[i][j] = D[i+1][j+1]                                                  if noisy[i] == clean[j]
       D[i][j] = 1 + min(D[i+1][j+1], D[i+1][j], D[i][j+1])                   otherwise     (SUB, DEL, INS)

   The canonical script is read from the left: at (0, 0), then wherever the last operation led, take the first of KEEP,
   SUB, DEL, INS that lies on an optimal path. That needs suffix distances, which is why the table is filled from its
   far corner: everything below runs on the reversed sequences.

   The bits.  Neighbouring cells differ by -1, 0 or +1, and a diagonal step adds 0 or 1 (Ukkonen 1985), so a column of
   the table is two bit vectors, and Myers (1999), here in the form of Hyyro (2003), computes 64 rows of the next column
   in about fifteen word operations. Call the longer sequence the pattern (rows r) and the shorter the text (columns c):

       vp, vn   row r is one more, one less than row r - 1                    (vertical differences of a column)
       hp, hn   this column is one more, one less than the column before      (horizontal differences)
       d0       the diagonal step into this cell adds 0
       eq       the pattern token of this row equals the text token of this column

   Taller patterns are cut into words of 64 rows; the horizontal difference at a word's last row is the carry into the
   word above. Two bits per cell are kept, and they decide the whole script: d0, and whether deleting is optimal (the
   vertical +1 if the pattern is the noisy sequence, else the horizontal +1).

   The wavefront.  Word w of column c needs word w of column c - 1 and the carry of word w - 1 of column c. So LANES
   words run side by side in one vector, each a column behind the one below it: lane l is at column t - l in step t.
   Patterns of more than 64 * LANES rows take several such strips, one after the other.

   What is kept of a strip is bits[step][plane][lane], plane 0 for d0 and 1 for "deleting is optimal".             */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { KEEP, SUB, DEL, INS };
enum { LANES = 8, ROWS = 64 * LANES }; /* words in a vector, table rows in a strip */

typedef uint64_t vector __attribute__((vector_size(8 * LANES)));

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(NO_CLONES)
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "avx2", "default"))) /* chosen when loaded */
#else
#define FOR_EACH_CPU
#endif
#ifdef __clang__
#define LANES_UP(v) __builtin_shufflevector(v, (vector){0}, 8, 0, 1, 2, 3, 4, 5, 6)
#else
#define LANES_UP(v) __builtin_shuffle(v, (vector){0}, (vector){8, 0, 1, 2, 3, 4, 5, 6})
#endif

/* Everything a pair of sequences needs, kept from pair to pair. */
typedef struct {
    char *memory;
    size_t capacity;
    vector *bits;            /* [strips][steps][2] */
    vector *eq;              /* [steps]: lane l of step t belongs to column t - l */
    vector *rows_of;         /* [distinct text tokens + 1]: where each of them stands in the strip's pattern */
    uint64_t *carry_p;       /* [text]: horizontal difference below the strip, +1 ... */
    uint64_t *carry_n;       /* [text]: ... or -1 */
    uint32_t *text_id;       /* [text], reversed: 1, 2, ... in order of appearance */
    uint32_t *pattern_id;    /* [pattern], reversed: 0 for a token that the text does not have */
    uint64_t *slots;         /* hash table of the text's distinct tokens: token << 32 | id */
    int slot_bits;
} workspace;

static char *carve(char **memory, size_t count, size_t size)
{
    char *part = *memory;
    *memory += (count * size + 63) / 64 * 64;
    return part;
}

/* Divides the memory between the arrays, growing it when they need more. Returns -1 when there is no more. */
static int reserve(workspace *w, size_t pattern, size_t text)
{
    size_t strips = (pattern + ROWS - 1) / ROWS, steps = text + LANES - 1;
    for (w->slot_bits = 4; (size_t)1 << w->slot_bits < 2 * text; w->slot_bits++);
    for (int pass = 0;; pass++) {
        char *end = w->memory;
        w->rows_of = (vector *)carve(&end, text + 1, sizeof(vector));
        w->eq = (vector *)carve(&end, steps, sizeof(vector));
        w->carry_p = (uint64_t *)carve(&end, steps, 8);
        w->carry_n = (uint64_t *)carve(&end, steps, 8);
        w->text_id = (uint32_t *)carve(&end, text, 4);
        w->pattern_id = (uint32_t *)carve(&end, pattern, 4);
        w->slots = (uint64_t *)carve(&end, (size_t)1 << w->slot_bits, 8);
        w->bits = (vector *)carve(&end, strips * steps * 2, sizeof(vector));
        size_t needed = end - w->memory;
        if (needed <= w->capacity) return 0;
        free(w->memory);
        w->capacity = needed;
        w->memory = aligned_alloc(64, needed);
        if (!w->memory) return -1;
    }
}

static uint64_t *find_slot(const workspace *w, uint32_t token)
{
    size_t mask = ((size_t)1 << w->slot_bits) - 1;
    size_t at = (token * 2654435769u) >> (32 - w->slot_bits);
    while (w->slots[at] && (uint32_t)(w->slots[at] >> 32) != token) at = (at + 1) & mask;
    return &w->slots[at];
}

static size_t number_tokens(workspace *w, const int32_t *pattern, size_t np, const int32_t *text, size_t nt)
{
    uint32_t distinct = 0;
    memset(w->slots, 0, sizeof(uint64_t) << w->slot_bits);
    for (size_t c = 0; c < nt; c++) {
        uint32_t token = text[nt - 1 - c];
        uint64_t *slot = find_slot(w, token);
        if (!*slot) *slot = (uint64_t)token << 32 | ++distinct;
        w->text_id[c] = (uint32_t)*slot;
    }
    for (size_t r = 0; r < np; r++) w->pattern_id[r] = (uint32_t)*find_slot(w, pattern[np - 1 - r]);
    return distinct;
}

FOR_EACH_CPU
static void fill_strip(vector *bits, const vector *eqs, uint64_t *carry_p, uint64_t *carry_n, size_t text,
                       int pattern_is_noisy)
{
    vector vp = ~(vector){0}, vn = {0}, hp = {0}, hn = ~(vector){0};
    vector noisy_rows = (vector){0} - (uint64_t)pattern_is_noisy;
    for (size_t t = 0; t < text + LANES - 1; t++) {
        vector hp_in = LANES_UP(hp >> 63) | (vector){carry_p[t]};
        vector hn_in = LANES_UP(hn >> 63) | (vector){carry_n[t]};
        vector eq = eqs[t] | hn_in;
        vector d0 = (((eq & vp) + vp) ^ vp) | eq | vn;
        hp = vn | ~(d0 | vp);
        hn = vp & d0;
        vector hp_up = hp << 1 | hp_in, hn_up = hn << 1 | hn_in;
        vp = hn_up | ~(d0 | hp_up);
        vn = hp_up & d0;
        bits[2 * t] = d0;
        bits[2 * t + 1] = (vp & noisy_rows) | (hp & ~noisy_rows);
        if (t >= LANES - 1) {
            carry_p[t - (LANES - 1)] = hp[LANES - 1] >> 63;
            carry_n[t - (LANES - 1)] = hn[LANES - 1] >> 63;
        }
    }
}

static void fill(workspace *w, size_t np, size_t nt, size_t distinct, int pattern_is_noisy)
{
    size_t steps = nt + LANES - 1;
    memset(w->rows_of, 0, (distinct + 1) * sizeof(vector));
    memset(w->eq, 0, steps * sizeof(vector));
    for (size_t t = 0; t < steps; t++) w->carry_p[t] = 1, w->carry_n[t] = 0;
    for (size_t first = 0; first < np; first += ROWS) {
        size_t rows = np - first < ROWS ? np - first : ROWS;
        const uint32_t *id = w->pattern_id + first;
        for (size_t r = 0; r < rows; r++) ((uint64_t *)(w->rows_of + id[r]))[r / 64] |= (uint64_t)1 << r % 64;
        w->rows_of[0] = (vector){0};
        int used = (rows + 63) / 64;
        for (size_t c = 0; c < nt; c++) {
            const uint64_t *from = (uint64_t *)(w->rows_of + w->text_id[c]);
            uint64_t *to = (uint64_t *)(w->eq + c);
            for (int l = 0; l < used; l++) to[l * (LANES + 1)] = from[l];
        }
        for (size_t r = 0; r < rows; r++) w->rows_of[id[r]] = (vector){0};
        fill_strip(w->bits + first / ROWS * steps * 2, w->eq, w->carry_p, w->carry_n, nt, pattern_is_noisy);
    }
}

static size_t trace(const workspace *w, const int32_t *noisy, size_t n, const int32_t *clean, size_t m, uint8_t *script)
{
    size_t i = 0, j = 0, steps = (n < m ? n : m) + LANES - 1;
    uint8_t *op = script;
    while (i < n && j < m) {
        if (noisy[i] == clean[j]) {
            *op++ = KEEP, i++, j++;
            continue;
        }
        size_t r = n < m ? m - 1 - j : n - 1 - i, c = n < m ? n - 1 - i : m - 1 - j;
        size_t lane = r / 64 % LANES;
        const uint64_t *word = (uint64_t *)(w->bits + (r / ROWS * steps + c + lane) * 2) + lane;
        if (!(word[0] >> r % 64 & 1))
            *op++ = SUB, i++, j++;
        else if (word[LANES] >> r % 64 & 1)
            *op++ = DEL, i++;
        else
            *op++ = INS, j++;
    }
    memset(op, DEL, n - i), op += n - i;
    memset(op, INS, m - j), op += m - j;
    return op - script;
}

/* Canonical scripts for pairs first, first + step, ... of `pairs`. */
int edit_scripts(int64_t pairs, int64_t first, int64_t step, const int32_t *noisy, const int64_t *noisy_fence,
                 const int32_t *clean, const int64_t *clean_fence, uint8_t *script, int64_t *length)
{
    workspace w = {0};
    for (int64_t b = first; b < pairs; b += step) {
        const int32_t *x = noisy + noisy_fence[b], *y = clean + clean_fence[b];
        size_t n = noisy_fence[b + 1] - noisy_fence[b], m = clean_fence[b + 1] - clean_fence[b], same = 0;
        uint8_t *out = script + noisy_fence[b] + clean_fence[b];
        while (same < n && same < m && x[same] == y[same]) out[same++] = KEEP;
        x += same, y += same, n -= same, m -= same;
        if (n && m) {
            int pattern_is_noisy = n >= m;
            size_t np = pattern_is_noisy ? n : m, nt = pattern_is_noisy ? m : n;
            if (reserve(&w, np, nt)) return -1;
            size_t distinct = number_tokens(&w, pattern_is_noisy ? x : y, np, pattern_is_noisy ? y : x, nt);
            fill(&w, np, nt, distinct, pattern_is_noisy);
        }
        length[b] = same + trace(&w, x, n, y, m, out + same);
    }
    free(w.memory);
    return 0;
}

/* The two targets of ME-DLM for the same pairs (edit_distance.py says what they mean), read from the right so that the
   token standing to the right of a gap is known when the gap is reached. */
void edit_labels(int64_t pairs, int64_t first, int64_t step, const int64_t *noisy_fence, const int32_t *clean,
                 const int64_t *clean_fence, const uint8_t *script, const int64_t *length, int64_t del_id,
                 int64_t eos_id, int64_t ignore_id, int64_t *token_target, int64_t *insert_target)
{
    for (int64_t b = first; b < pairs; b += step) {
        int64_t i = noisy_fence[b + 1], j = clean_fence[b + 1], right = eos_id;
        const uint8_t *op = script + noisy_fence[b] + clean_fence[b];
        for (int64_t k = length[b] - 1; k >= 0; k--) {
            if (op[k] == INS) {
                right = clean[--j];
                continue;
            }
            insert_target[i-- + b] = op[k] == DEL ? ignore_id : right;
            token_target[i] = op[k] == DEL ? del_id : (right = clean[--j]);
        }
        insert_target[i + b] = right;
    }
}
