"""Operations on packed weights; one module per operation, which picks the implementation."""
