// Ownership of grad_value: each task owns, for a map and a head of the value, a band of lines of
// pixels of every level. A pixel receives from the points of its four cells in one order (by cell
// or by query, see ScatterOrder) wherever the bands begin: the sums do not depend on how many there
// are.

class Band {
 public:
  // Rows of the value, [first, end), counted within the level.
  struct Rows {
    int64_t first, end;
  };

  Band(const Plan& plan, int64_t index) : plan_(plan), index_(index) {}

  Rows rows(const Level& level) const {
    const int64_t num_bands = plan_.num_bands;
    return {level.num_lines() * index_ / num_bands * level.width,
            level.num_lines() * (index_ + 1) / num_bands * level.width};
  }

  // Whether the band owns a row, counted over all levels.
  bool owns(int64_t row) const {
    for (const Level& level : plan_.levels) {
      const Rows owned = rows(level);
      if (row >= level.first_row + owned.first && row < level.first_row + owned.end) {
        return true;
      }
    }
    return false;
  }

  // Calls run(first, end) for the rows of each level, counted over all levels.
  template <class Run>
  void for_each_range(Run run) const {
    for (const Level& level : plan_.levels) {
      const Rows owned = rows(level);
      run(level.first_row + owned.first, level.first_row + owned.end);
    }
  }

 private:
  const Plan& plan_;
  int64_t index_;
};
